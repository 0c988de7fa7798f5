"""Starts a service when the machine starts, by a line in this user's crontab."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess

from pagoda.deploy.service.service import Service, program
from pagoda.errors import ConfigError

_KEPT = ("XDG_CONFIG_HOME", "TMUX_TMPDIR", "PYTHONPATH")


def start_at_boot(service: Service) -> None:
    """ConfigError where this user has no crontab."""
    others = [line for line in _lines() if not line.endswith(_mark(service))]
    _write([*others, _line(service)])


def not_at_boot(service: Service) -> None:
    """Take the line away again, if there is one."""
    lines = _lines()
    others = [line for line in lines if not line.endswith(_mark(service))]
    if len(others) < len(lines):
        _write(others)


def _line(service: Service) -> str:
    """cron gives a short PATH and nothing else: where tmux is, and what this user has set, is told."""
    tmux = os.path.dirname(shutil.which("tmux") or "/usr/bin/tmux")
    given = {"PATH": f"{tmux}:/usr/bin:/bin", **{name: os.environ[name] for name in _KEPT if os.environ.get(name)}}
    start = [*program(os.environ), "service", "start", service.name]
    command = shlex.join(["env", *(f"{name}={value}" for name, value in given.items()), *start])
    return f"@reboot {command} >/dev/null 2>&1 {_mark(service)}".replace("%", "\\%")


def _mark(service: Service) -> str:
    return f"# pagoda service {service.name}"


def _lines() -> list[str]:
    """The crontab as it is; crontab fails where there is none yet."""
    done = _crontab("-l")
    if done.returncode != 0 and "no crontab" not in done.stderr:
        raise ConfigError(f"crontab -l failed: {done.stderr.strip()}")
    return done.stdout.splitlines() if done.returncode == 0 else []


def _write(lines: list[str]) -> None:
    done = _crontab("-", text="".join(f"{line}\n" for line in lines)) if lines else _crontab("-r")
    if done.returncode != 0:
        raise ConfigError(f"crontab failed: {done.stderr.strip()}")


def _crontab(word: str, text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["crontab", word], input=text, capture_output=True, text=True, check=False)
    except OSError:
        raise ConfigError("crontab is not installed") from None
