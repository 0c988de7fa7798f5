"""What a service is on disk: a folder with its options, its secrets and how it is kept running."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from pagoda.errors import ConfigError

OPTIONS_FILE = "serve.yaml"
SECRETS_FILE = "env"
ABOUT_FILE = "service.json"
KINDS = ("systemd", "tmux", "compose")
HOPELESS_EXITS = (65, 77, 78)
"""Exit codes after which starting again is no use: the model is broken, no permission, an option is wrong."""
START_LIMIT_S = 3600
WATCHDOG_S = 120
MOST_STARTS = 5
STARTS_WINDOW_S = 600
LAUNCHER_VARIABLE = "PAGODA_LAUNCHER"

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:/@%+=-]*")


@dataclass(frozen=True, kw_only=True)
class Service:
    """One server to keep running. `options` are those of `pagoda serve`, `secrets` its environment."""

    name: str
    via: str
    folder: Path
    options: Mapping[str, Any]
    secrets: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options_path(self) -> Path:
        return self.folder / OPTIONS_FILE

    @property
    def secrets_path(self) -> Path:
        return self.folder / SECRETS_FILE

    @property
    def port(self) -> int:
        return int(self.options.get("port", 8000))

    @property
    def url(self) -> str:
        """Where it answers, seen from this machine."""
        host = str(self.options.get("host", "127.0.0.1"))
        host = "127.0.0.1" if host in ("", "0.0.0.0", "::", "localhost") else host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def stop_s(self) -> int:
        """How long a stop may take: running requests finish first."""
        return int(self.options.get("shutdown-timeout", 30)) + 15


@dataclass(frozen=True, slots=True)
class State:
    """How a service is: `word` is running, starting, stopped or failed."""

    word: str
    pid: int | None = None
    since_s: float | None = None
    detail: str = ""


class Manager(Protocol):
    """A way to keep services running."""

    def check(self) -> None:
        """Raise ConfigError where this machine does not have it."""
        ...

    def files(self, service: Service) -> Mapping[Path, str]: ...
    def enable(self, service: Service) -> str:
        """Let it start at boot; a sentence that says so, or why it will not."""
        ...

    def start(self, service: Service) -> None: ...
    def stop(self, service: Service) -> None: ...
    def restart(self, service: Service) -> None: ...
    def remove(self, service: Service) -> None: ...
    def state(self, service: Service) -> State: ...
    def tail(self, service: Service, lines: int) -> list[str]: ...
    def follow(self, service: Service, lines: int) -> Sequence[str]:
        """The command that shows the log and what is added to it."""
        ...


def program(environ: Mapping[str, str]) -> list[str]:
    """The command `pagoda`, to be written down: this Python, or the launcher of an unpacked pack, which outlives it."""
    launcher = environ.get(LAUNCHER_VARIABLE)
    return [launcher] if launcher else [sys.executable, "-m", "pagoda.cli.main"]


def name_for(model: str) -> str:
    """A service's name from its model's: qwen3-0-6b of ./Qwen3-0.6B/."""
    base = model.rstrip("/").split("/")[-1].split(":")[0].removesuffix(".gguf").lower()
    return re.sub(r"[^a-z0-9_]+", "-", base).strip("-_")[:40].rstrip("-") or "model"


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a service", remedy="Use up to 40 small letters, digits, - and _: --name qwen3"
        )
    return name


def secrets_text(secrets: Mapping[str, str]) -> str:
    """NAME=VALUE lines that systemd, compose and `read_secrets` read alike."""
    out = []
    for name, value in sorted(secrets.items()):
        if "'" in value or "\n" in value:
            raise ConfigError(f"the value of {name} holds a quote or a line break", remedy="Use another value")
        out.append(f"{name}={value}\n" if _PLAIN.fullmatch(value) else f"{name}='{value}'\n")
    return "".join(out)


def read_secrets(path: Path) -> dict[str, str]:
    """The variables of a file of NAME=VALUE lines."""
    lines = (line.partition("=") for line in path.read_text("utf-8").splitlines() if not line.startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, equals, value in lines if equals}


def options_text(options: Mapping[str, Any]) -> str:
    """The YAML file that `pagoda serve --config` reads."""
    return yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)


def save(service: Service, more: Mapping[Path, str]) -> None:
    """Write all files of a service; the secrets so that nobody else can read them, not even for a moment."""
    try:
        service.folder.mkdir(parents=True, exist_ok=True)
        write_private(service.secrets_path, secrets_text(service.secrets))
        about = json.dumps({"via": service.via, **service.about}, indent=1) + "\n"
        for path, text in {
            service.options_path: options_text(service.options),
            service.folder / ABOUT_FILE: about,
            **more,
        }.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            path.chmod(0o644)
    except OSError as error:
        root = service.via == "systemd" and isinstance(error, PermissionError)
        remedy = "As root: sudo; or add --user" if root else "Set XDG_CONFIG_HOME to a folder you may write to"
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}", remedy=remedy) from None


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600, whatever the one before had."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def saved(folders: Sequence[Path]) -> Iterator[Service]:
    """All services below these folders."""
    for path in sorted(found for folder in folders for found in folder.glob(f"*/{ABOUT_FILE}")):
        yield load(path.parent)


def load(folder: Path) -> Service:
    """The service that `save` wrote to this folder; its options as they are now."""
    try:
        about = json.loads((folder / ABOUT_FILE).read_text("utf-8"))
        options = yaml.safe_load((folder / OPTIONS_FILE).read_text("utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the service in {folder} cannot be read: {error}", remedy="Install it again") from None
    return Service(name=folder.name, via=about.pop("via"), folder=folder, options=options, about=about)


_NO_DOCKER = ("Cannot connect to the Docker daemon", "Error while fetching server API version", "docker.sock")


def call(*command: str, needs: str = "") -> str:
    """What a command prints; ConfigError with its own last words where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not installed", remedy=needs) from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [""]
        words = next((line for line in reversed(lines) if "ERROR: " in line), lines[-1])
        if any(sign in words for sign in _NO_DOCKER):
            raise ConfigError(
                "Docker does not answer: its service is stopped, or this user may not use it",
                remedy='Start it: sudo systemctl start docker, or: sudo usermod -aG docker "$USER" and log in again',
            )
        raise ConfigError(f"{command[0]} failed: {words}", remedy=needs or f"Try it: {shlex.join(command)}")
    return done.stdout
