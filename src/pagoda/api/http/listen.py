"""Takes the address to listen on, before anything heavy is imported or loaded; errors say who has it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat

import psutil

from pagoda.errors import PagodaError

BACKLOG = 2048
MANY_FILES = 65536


class PortTaken(PagodaError):
    """Somebody else listens there."""

    exit_code = 98


class CannotListen(PagodaError):
    """The address cannot be used: no permission, or it is not one of this machine."""

    exit_code = 77


def allow_many_files() -> None:
    """Each client needs a file: as many as this user may have, where a shell gives 1024 unless told otherwise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def bind_socket(host: str, port: int, uds: str | None = None) -> socket.socket:
    """Take the address now, before a model is loaded for nothing. Raises PortTaken or CannotListen."""
    if uds is not None:
        return _bind_unix(uds)
    try:
        info = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror:
        raise CannotListen(f"{host} is no address of this machine", remedy="Use --host 127.0.0.1 or 0.0.0.0") from None
    made = socket.socket(info[0], socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(info[4])
    except OSError as error:
        made.close()
        raise cannot_listen(error, host, port) from None
    made.setblocking(False)
    return made


def _bind_unix(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
                os.unlink(path)
        made.bind(path)
    except OSError as error:
        made.close()
        raise CannotListen(f"the socket {path} cannot be made: {error.strerror}", remedy="Use another --uds") from None
    made.setblocking(False)
    return made


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


def cannot_listen(error: OSError, host: str, port: int) -> PagodaError:
    """What an error of bind or listen means."""
    if error.errno == errno.EADDRINUSE:
        return PortTaken(f"port {port} is taken{_owner(port)}", remedy=f"Use another one: --port {port + 1}")
    if error.errno == errno.EACCES:
        return CannotListen(f"no permission to listen on port {port}", remedy="Use a port above 1023: --port 8000")
    return CannotListen(f"cannot listen on {host}:{port}: {error.strerror}", remedy="Use --host 127.0.0.1 or 0.0.0.0")


def _owner(port: int) -> str:
    """Who listens on a port, as far as the system lets us see."""
    try:
        for seen in psutil.net_connections("tcp"):
            if seen.status == psutil.CONN_LISTEN and seen.laddr and seen.laddr.port == port and seen.pid:
                return f" by process {seen.pid} ({psutil.Process(seen.pid).name()})"
    except (psutil.Error, OSError):
        pass
    return ""
