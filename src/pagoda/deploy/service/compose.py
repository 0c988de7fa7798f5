"""Services in containers: one compose.yaml for all of them, and the commands that drive it."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pagoda import __version__
from pagoda.deploy.service.service import Service, State, call, options_text, saved
from pagoda.errors import ConfigError

COMPOSE_FILE = "compose.yaml"
DOCKERFILE = "Dockerfile"
CONTAINER_FILE = "container.yaml"
PORT = 8000
_INSTALL = "Install Docker with its compose plugin: https://docs.docker.com/engine/install/"
_HEALTH = (
    "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"
)
# For an installed Pagoda; a checkout has a Dockerfile of its own, which compiles it.
_DOCKERFILE = """\
# Written by pagoda service install. Triton compiles at run time: only the cuda variant holds a compiler.
FROM python:3.12-slim
ARG VARIANT=cpu
RUN if [ "$VARIANT" = cuda ]; then \\
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \\
      pip install --no-cache-dir "pagoda-llm[cuda]=={version}"; \\
    else pip install --no-cache-dir "pagoda-llm=={version}"; fi \\
  && useradd --uid 1000 --create-home pagoda && install -d -o pagoda /cache
USER pagoda
ENV HF_HOME=/cache/huggingface PAGODA_CACHE=/cache/pagoda TRITON_CACHE_DIR=/cache/triton PAGODA_HOST=0.0.0.0
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["pagoda", "serve"]
"""


class Compose:
    """Each service is one in the compose file of the folder that holds them all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self) -> None:
        """Files can be written anywhere; `start` needs Docker."""

    def files(self, service: Service) -> Mapping[Path, str]:
        others = [one for one in self._members() if one.name != service.name]
        tables = [_inside(*each) for each in _mounted(service)]
        models = {"models": tables} if "models" in service.options else tables[0]
        container = {**service.options, **models, "host": "0.0.0.0", "port": PORT}
        for name in ("log-file", "files-dir", "download-dir"):  # folders of this machine; the container has its own
            container.pop(name, None)
        out = {
            service.folder / CONTAINER_FILE: options_text(container),
            self._folder / COMPOSE_FILE: compose_text([*others, service]),
        }
        return out if source_tree() else {**out, self._folder / DOCKERFILE: _DOCKERFILE.format(version=__version__)}

    def enable(self, service: Service) -> str:
        return "Docker starts it at boot, unless it was stopped."

    def start(self, service: Service) -> None:
        self._call("up", "--detach", "--build", service.name)

    def stop(self, service: Service) -> None:
        self._call("stop", service.name)

    def restart(self, service: Service) -> None:
        self._call("up", "--detach", "--force-recreate", service.name)

    def remove(self, service: Service) -> None:
        with contextlib.suppress(ConfigError):  # without Docker there is no container
            self._call("rm", "--stop", "--force", service.name)
        rest = [one for one in self._members() if one.name != service.name]
        if rest:
            (self._folder / COMPOSE_FILE).write_text(compose_text(rest), "utf-8")
        else:
            for name in (COMPOSE_FILE, DOCKERFILE):
                (self._folder / name).unlink(missing_ok=True)

    def state(self, service: Service) -> State:
        shown = (
            "{{.State.Status}} {{.State.Pid}} {{.State.StartedAt}} {{if .State.Health}}{{.State.Health.Status}}{{end}}"
        )
        try:
            ids = self._call("ps", "--quiet", "--all", service.name).split()
            lines = [call("docker", "inspect", "--format", shown, one).split() for one in ids]
        except ConfigError as error:
            return State("stopped", detail=error.message)
        states = sorted(map(state_of, lines), key=lambda state: state.word != "running")
        if not states:
            return State("stopped")
        run = sum(state.word == "running" for state in states)
        return states[0] if len(states) == 1 else replace(states[0], detail=f"{run} of {len(states)} containers run")

    def tail(self, service: Service, lines: int) -> list[str]:
        try:
            return self._call(*_logs(service, lines)).splitlines()
        except ConfigError:
            return []

    def follow(self, service: Service, lines: int) -> Sequence[str]:
        return (*self._command(), *_logs(service, lines), "--follow")

    def _members(self) -> list[Service]:
        return [one for one in saved([self._folder]) if one.via == "compose"]

    def _command(self) -> tuple[str, ...]:
        docker = _docker()
        if docker is None:
            raise ConfigError("Docker with its compose plugin is not installed", remedy=_INSTALL)
        return (*docker, "--project-name", "pagoda", "--file", str(self._folder / COMPOSE_FILE))

    def _call(self, *words: str) -> str:
        return call(*self._command(), *words)


def _logs(service: Service, lines: int) -> tuple[str, ...]:
    names = () if _replicas(service) > 1 else ("--no-log-prefix",)
    return ("logs", "--no-color", *names, f"--tail={lines}", service.name)


def _replicas(service: Service) -> int:
    return int(service.about.get("replicas", 1))


def state_of(shown: Sequence[str]) -> State:
    """What `docker inspect` tells: status, process, start, health."""
    status, pid, started, health = (*shown, "")[:4]
    if status != "running":
        return State({"restarting": "starting", "dead": "failed"}.get(status, "stopped"))
    since_s = datetime.datetime.fromisoformat(started[:19] + "+00:00").timestamp()
    return State("starting" if health == "starting" else "running", int(pid) or None, since_s, health)


def compose_text(services: Iterable[Service]) -> str:
    """The compose file; host paths as they are, so that it can be read and moved."""
    content = {
        "services": {one.name: _container(one) for one in sorted(services, key=lambda s: s.name)},
        "volumes": {"cache": {}},
    }
    note = "# Written by pagoda service install, anew with each service. All of them: docker compose -p pagoda up -d\n"
    return note + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def _container(service: Service) -> dict[str, Any]:
    gpus, replicas = service.about.get("gpus"), _replicas(service)
    tree = source_tree()
    variant = "cuda" if gpus else "cpu"
    host = "" if (named := str(service.options.get("host", "127.0.0.1"))) == "0.0.0.0" else f"{named}:"
    last = service.port + replicas - 1
    outside = str(service.port) if replicas == 1 else f"{service.port}-{last}"
    volumes = [
        f"./{service.name}/{CONTAINER_FILE}:/etc/pagoda/serve.yaml:ro",
        "cache:/cache",
    ]
    for _, place, below, mount in _mounted(service):
        if mount:
            volumes.append(f"{mount}:{place}{below if Path(mount).is_file() else ''}:ro")
    deploy: dict[str, Any] = {"replicas": replicas} if replicas > 1 else {}
    if gpus:
        deploy["resources"] = {"reservations": {"devices": [_device(str(gpus))]}}
    return {
        "image": f"pagoda:{__version__}-{variant}",
        "build": {"context": str(tree) if tree else ".", "args": {"VARIANT": variant}},
        "command": ["--config", "/etc/pagoda/serve.yaml"],
        "ports": [f"{host}{outside}:{PORT}"],
        "env_file": [f"./{service.name}/env"],
        "volumes": volumes,
        "healthcheck": {
            "test": ["CMD", "python", "-c", _HEALTH],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": "30m",
        },
        "restart": "unless-stopped",
        "stop_grace_period": f"{service.stop_s}s",
        "init": True,
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "shm_size": "1gb",
        "logging": {"driver": "local", "options": {"max-size": "20m", "max-file": "5"}},
        **({"deploy": deploy} if deploy else {}),
    }


def _device(gpus: str) -> dict[str, Any]:
    """`all`, a number of GPUs, or `0,2`: those (one alone: `0,`)."""
    which: dict[str, Any] = {"device_ids": [one for one in gpus.split(",") if one]} if "," in gpus else {}
    count = {} if which else {"count": gpus if gpus == "all" else int(gpus)}
    return {"driver": "nvidia", **count, **which, "capabilities": ["gpu"]}


def _mounted(service: Service) -> list[tuple[Mapping[str, Any], str, str, str]]:
    """Of each model: its options, its place in the container, where it lies below that, and what is mounted there."""
    models = service.options.get("models")
    tables = [service.options] if models is None else models
    places = [f"/models/{service.name}" + (f"/{number}" if models else "") for number in range(len(tables))]
    mounts = [_model_mount(str(table.get("model", ""))) for table in tables]
    return [(table, place, *mount) for table, place, mount in zip(tables, places, mounts, strict=True)]


def _inside(table: Mapping[str, Any], place: str, below: str, mount: str) -> dict[str, Any]:
    """The options of a model in the container, under the name that it has outside."""
    if not mount:
        return dict(table)
    own = {**table, "model": f"{place}{below}"}
    own.setdefault("served-model-name", [table["model"]])
    return own


def _model_mount(named: str) -> tuple[str, str]:
    """The model's place below what is mounted, and that folder or file; both '' for a model that is fetched.

    A cache keeps links to files elsewhere: then their common folder is mounted.
    """
    path = Path(named)
    if not path.is_absolute() or not path.exists():
        return "", ""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    whole = Path(os.path.commonpath([path, *(p.resolve() for p in files)]))
    below = path.name if whole == path and path.is_file() else os.path.relpath(path, whole)
    return ("" if below == "." else f"/{below}"), str(whole)


def source_tree() -> Path | None:
    """The checkout that this Pagoda runs from, if it does: an image is built from that."""
    tree = Path(__file__).resolve().parents[4]
    return tree if (tree / DOCKERFILE).is_file() and (tree / "pyproject.toml").is_file() else None


def _docker() -> tuple[str, ...] | None:
    """`docker compose`, or the older `docker-compose`."""
    if shutil.which("docker") is not None:
        asked = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if asked.returncode == 0:
            return ("docker", "compose")
    return ("docker-compose",) if shutil.which("docker-compose") else None
