"""Starts the engine process, which imports what it needs while nobody has told it yet which model to load."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType

COMMAND = (sys.executable, "-P", "-m", "pagoda.engine.process")
_STDERR = 2
_AS_OURS: Mapping[str, str] = MappingProxyType({})


class EngineProcess:
    """The process and our end of its socket. As a context it is ended with the block, unless somebody took it over.

    `environ` is what its environment has beside ours.

    Make it in a thread that lives as long as the server: Linux kills the engine when that thread ends.
    """

    def __init__(self, device: str, command: Sequence[str] = COMMAND, environ: Mapping[str, str] = _AS_OURS) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Its own process group: a terminal's Ctrl-C is for the server. Standard output belongs to the server.
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                process_group=0,
                env={**_environment(device), **environ},
            )
        self._sock = ours
        self._taken = False

    def take(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Both, for one who ends them himself."""
        self._taken = True
        return self._process, self._sock

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._taken:
            self._sock.close()
            self._process.kill()
            self._process.wait()


def _environment(device: str) -> dict[str, str]:
    """Ours; numpy's own threads serve the reference executor only, elsewhere they would just take memory."""
    threads = {} if device == "reference" else {"OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads}
