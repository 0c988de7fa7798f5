"""Services under systemd: the unit, and the commands that drive it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pagoda.deploy.service.service import (
    HOPELESS_EXITS,
    MOST_STARTS,
    START_LIMIT_S,
    STARTS_WINDOW_S,
    WATCHDOG_S,
    Service,
    State,
    call,
    program,
)
from pagoda.errors import ConfigError
from pagoda.observe import printable

SYSTEM_UNITS = Path("/etc/systemd/system")
_STEPS_SINCE = 254
_ROOT_ONLY = """\
PrivateTmp=yes
ProtectSystem=full
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectHostname=yes
"""
# No PrivateDevices, DeviceAllow or ProtectClock (it implies DeviceAllow): they take the GPU away.
# No MemoryDenyWriteExecute: kernels are compiled at run time. ProtectKernelModules would keep the driver out.
_HARDENING = """\
NoNewPrivileges=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictNamespaces=yes
LockPersonality=yes
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
UMask=0077
"""


class Systemd:
    """`user`: the user's own manager, which needs no root. `units` is the folder of unit files."""

    def __init__(self, *, user: bool, units: Path | None = None) -> None:
        self._user = user
        self._units = units or (_user_units() if user else SYSTEM_UNITS)
        self._systemctl = ("systemctl", "--user") if user else ("systemctl",)

    def check(self) -> None:
        if shutil.which("systemctl") is None or not (self._user or Path("/run/systemd/system").is_dir()):
            raise ConfigError("systemd does not run on this machine", remedy="Use tmux: --via tmux")
        if self._user:
            try:
                call(*self._systemctl, "show-environment")
            except ConfigError:
                raise ConfigError("systemd does not run for this user", remedy="Use tmux: --via tmux") from None
        elif os.geteuid() != 0:
            raise ConfigError(
                "a service of the whole system needs root",
                remedy="Add --user for a service of your own, or put sudo in front",
            )

    def unit(self, service: Service) -> Path:
        return self._units / f"{unit_name(service)}.service"

    def files(self, service: Service) -> Mapping[Path, str]:
        return {self.unit(service): unit_text(service, user=self._user, version=_version())}

    def enable(self, service: Service) -> str:
        owner = service.about.get("run_as")
        if owner and owner != "root":
            shutil.chown(service.folder, owner)
            shutil.chown(service.options_path, owner)
        call(*self._systemctl, "daemon-reload")
        call(*self._systemctl, "enable", "--quiet", unit_name(service))
        try:
            if self._user:
                call("loginctl", "enable-linger")
        except ConfigError:
            return 'It ends when you log out, unless root allows more: sudo loginctl enable-linger "$USER"'
        return "It starts at boot."

    def start(self, service: Service) -> None:
        with contextlib.suppress(ConfigError):  # nothing failed before
            call(*self._systemctl, "reset-failed", unit_name(service))
        call(*self._systemctl, "start", "--no-block", unit_name(service))

    def stop(self, service: Service) -> None:
        call(*self._systemctl, "stop", unit_name(service))

    def restart(self, service: Service) -> None:
        self.stop(service)
        self.start(service)

    def remove(self, service: Service) -> None:
        with contextlib.suppress(ConfigError):  # it may be half installed
            call(*self._systemctl, "disable", "--now", "--quiet", unit_name(service))
        self.unit(service).unlink(missing_ok=True)
        call(*self._systemctl, "daemon-reload")
        with contextlib.suppress(ConfigError):
            call(*self._systemctl, "reset-failed", unit_name(service))

    def state(self, service: Service) -> State:
        names = ("ActiveState", "SubState", "MainPID", "Result", "StatusText", "ActiveEnterTimestampMonotonic")
        shown = call(*self._systemctl, "show", unit_name(service), f"--property={','.join(names)}")
        return state_of(dict(line.split("=", 1) for line in shown.splitlines() if "=" in line))

    def tail(self, service: Service, lines: int) -> list[str]:
        try:
            return call(*self._journal(service, lines), "--output=cat").splitlines()
        except ConfigError:
            return []

    def follow(self, service: Service, lines: int) -> Sequence[str]:
        return (*self._journal(service, lines), "--follow")

    def _journal(self, service: Service, lines: int) -> tuple[str, ...]:
        unit = "--user-unit" if self._user else "--unit"
        return ("journalctl", "--no-pager", unit, unit_name(service), f"--lines={lines}")


def unit_name(service: Service) -> str:
    return f"pagoda-{service.name}"


def state_of(shown: Mapping[str, str]) -> State:
    """What `systemctl show` tells."""
    active, pid = shown.get("ActiveState", "inactive"), int(shown.get("MainPID") or 0)
    word = {"active": "running", "activating": "starting", "reloading": "running", "failed": "failed"}
    entered_us = int(shown.get("ActiveEnterTimestampMonotonic") or 0)
    since_s = time.time() - (time.monotonic() - entered_us / 1e6) if entered_us and active == "active" else None
    result = shown.get("Result", "success")
    said = shown.get("StatusText", "") if active in word else ""  # what it said last, when it has ended
    detail = said if result == "success" else f"{shown.get('SubState')}, {result}"
    return State(word.get(active, "stopped"), pid or None, since_s, detail)


def unit_text(service: Service, *, user: bool, version: int) -> str:
    """The unit file."""
    return "".join(f"{line}\n" for line in _unit_lines(service, user=user, version=version))


def _unit_lines(service: Service, *, user: bool, version: int) -> Iterator[str]:
    command = [*program(os.environ), "serve", "--config", str(service.options_path)]
    yield f"# Written by pagoda service install. Options: {service.options_path}; secrets: {service.secrets_path}"
    yield from ("[Unit]", f"Description=Pagoda serves {_literal(service.options.get('model', 'its default model'))}")
    if not user:
        yield from ("After=network-online.target", "Wants=network-online.target")
    yield from (f"StartLimitIntervalSec={STARTS_WINDOW_S}", f"StartLimitBurst={MOST_STARTS}", "")
    yield from ("[Service]", "Type=notify", "NotifyAccess=main")
    yield f"ExecStart={' '.join(map(quoted, command))}"
    yield f"EnvironmentFile={_literal(service.secrets_path)}"
    yield "Environment=PYTHONUNBUFFERED=1"
    if not user:
        yield f"User={service.about.get('run_as', 'root')}"
    # Loading takes what it takes; a server that is loaded must give a sign of life.
    yield from (f"TimeoutStartSec={START_LIMIT_S}", f"WatchdogSec={WATCHDOG_S}", f"TimeoutStopSec={service.stop_s}")
    yield from ("Restart=on-failure", "RestartSec=2")
    if version >= _STEPS_SINCE:
        yield from ("RestartSteps=5", "RestartMaxDelaySec=60")
    yield f"RestartPreventExitStatus={' '.join(map(str, HOPELESS_EXITS))}"
    # The engine alone may run out of memory: the server starts it again.
    yield from ("KillMode=mixed", "OOMPolicy=continue", "LimitNOFILE=65536", "LimitMEMLOCK=infinity")
    yield from ("TasksMax=infinity", f"SyslogIdentifier={unit_name(service)}")
    yield from _HARDENING.splitlines()
    if not user:
        yield from _ROOT_ONLY.splitlines()
        bind = "CAP_NET_BIND_SERVICE" if service.port < 1024 else ""
        yield from (f"CapabilityBoundingSet={bind}", f"AmbientCapabilities={bind}")
    yield from ("", "[Install]", f"WantedBy={'default' if user else 'multi-user'}.target")


def quoted(word: str) -> str:
    """One word of ExecStart, read literally."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{plain}"' if plain != word or " " in word else word


def _literal(value: object) -> str:
    return printable(str(value)).replace("%", "%%")


def owner_of(path: Path, environ: Mapping[str, str]) -> str:
    """As whom a server of the system runs: who called sudo, else whom the model belongs to."""
    if called := environ.get("SUDO_USER"):
        return called
    try:
        return path.owner()
    except (OSError, KeyError):
        return next((one.pw_name for one in pwd.getpwall() if one.pw_uid == os.geteuid()), "root")


def _user_units() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "systemd" / "user"


def _version() -> int:
    """The version of systemd; the oldest that is known to do if it does not tell."""
    try:
        shown = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout
        return int(shown.split()[1])
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return 245
