"""`pagoda service`: keeps a server running, under systemd, in tmux or in containers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagoda.cli.inputs import load as load_options
from pagoda.cli.inputs import split
from pagoda.cli.screen import size, table
from pagoda.cli.words import Words, read_words, take_words
from pagoda.deploy.service import service as disk
from pagoda.deploy.service.compose import Compose
from pagoda.deploy.service.options import service_options, service_secrets
from pagoda.deploy.service.scrape import CannotAsk, health, sample
from pagoda.deploy.service.service import Manager, Service, State
from pagoda.deploy.service.systemd import Systemd, owner_of
from pagoda.deploy.service.tmux import Tmux
from pagoda.errors import ConfigError
from pagoda.options.check import check
from pagoda.options.resolve import each_model

HELP = """\
Usage: pagoda service install MODEL [options] [options of pagoda serve]
       pagoda service start|stop|restart|status|logs|uninstall [NAME]

Keeps a server running: it is started again when it fails, and when it hangs. install takes what `pagoda serve` takes.
NAME may be left out where there is only one service; status without NAME shows all.

Examples:
  sudo pagoda service install ./qwen3-0.6b --port 8001 --api-key "$KEY"
  pagoda service install ./qwen3-0.6b --user
  pagoda service install ./qwen3-0.6b --via tmux --name qwen
  pagoda service install ./qwen3-0.6b --via compose --gpus all
  pagoda service start
  pagoda service logs -f

Options of install:
  --via WAY         systemd (default), tmux (no root, no systemd) or compose (Docker)
  --name NAME       the service's name (default: from the model's)
  --user            systemd: a service of this user, without root (default for those who are not root)
  --run-as USER     systemd: the user it runs as (default: who called sudo, else whom the model belongs to)
  --gpus WHICH      compose: all, how many, or which: 0,1 (only the first: 0,)
  --replicas N      so many engines behind one port; compose: so many containers, on as many ports from --port on
  --start           start it now
  --dry-run         print the files, and write nothing

Options of logs: -f (follow), -n LINES (default 50). Of status: --json.
"""
VERBS = ("install", "start", "stop", "restart", "status", "logs", "uninstall")
_OF_INSTALL = ("via", "name", "run-as", "gpus", "replicas")
_SWITCHES = ("user", "start", "dry-run")
_POLL_S = 0.3
_GRACE_S = 2.0
"""For as long a service may look stopped because its start has only been asked for."""


def run(argv: list[str]) -> int:
    """The command; the result is the exit code."""
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help", "help") or (verb in VERBS and any(word in ("-h", "--help") for word in rest)):
        print(HELP, end="")
        return 0
    if verb not in VERBS:
        raise ConfigError(f"pagoda service has no {verb}", remedy=f"One of {', '.join(VERBS)}")
    if verb == "install":
        return _install(rest)
    words = read_words(f"service {verb}", rest, ("lines",), ("follow", "json"), {"-f": "follow", "-n": "lines"})
    if len(words.plain) > 1:
        raise ConfigError(f"one word too many: {words.plain[1]}", remedy="See: pagoda service --help")
    name = words.plain[0] if words.plain else None
    if verb == "status":
        return _status(name, as_json="json" in words.switches)
    service = _find(name)
    if verb == "logs":
        return _logs(service, words.last("lines") or "50", follow="follow" in words.switches)
    return _change(verb, service)


def system_folder() -> Path:
    return Path("/etc/pagoda")


def own_folder() -> Path:
    """Where this user's services are."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "pagoda" / "services"


def manager_of(service: Service) -> Manager:
    if service.via == "systemd":
        return Systemd(user=bool(service.about.get("user")))
    return Tmux() if service.via == "tmux" else Compose(service.folder.parent)


def _install(argv: list[str]) -> int:
    words, rest = take_words([word for word in argv if word != "--"], _OF_INSTALL, _SWITCHES)
    service = _planned(words, rest)
    manager = manager_of(service)
    if "dry-run" not in words.switches:
        manager.check()
        others = [one for one in _all() if one.name != service.name and one.port == service.port]
        if others:
            print(f"note: {others[0].name} uses port {service.port} too: only one of them can run", file=sys.stderr)
    files = manager.files(service)
    for path, text in {service.options_path: disk.options_text(service.options), **files}.items():
        print(f"# {path}\n{text}")
    if "dry-run" in words.switches:
        return 0
    disk.save(service, files)
    at_boot = manager.enable(service)
    print(f"{service.name} is installed; keys and tokens are in {service.secrets_path}, readable by its owner only.")
    print(at_boot)
    if "start" in words.switches:
        return _change("start", service)
    print(f"Start it: pagoda service start {service.name}")
    return 0


def _planned(words: Words, rest: list[str]) -> Service:
    via = words.values.get("via", ["systemd"])[-1]
    if via not in disk.KINDS:
        raise ConfigError(f"--via {via}: there is no such way", remedy=f"Give one of {', '.join(disk.KINDS)}")
    if "gpus" in words.values and via != "compose":
        raise ConfigError("--gpus is for --via compose", remedy="Leave --gpus out")
    replicas = words.values.get("replicas", ["1"])[-1]
    if "replicas" in words.values and via != "compose":
        rest = [*rest, "--replicas", replicas]
    inputs = split(rest)
    settings = load_options(inputs, os.environ)
    for each in each_model(settings):
        check(dataclasses.replace(settings, options=each))
    for line in settings.notices:
        print(f"note: {line}", file=sys.stderr)
    options = service_options(settings, os.environ)
    user = via == "systemd" and ("user" in words.switches or os.geteuid() != 0) and "run-as" not in words.values
    about: dict[str, object] = {"user": user} if via == "systemd" else {}
    if via == "systemd" and not user:
        about["run_as"] = words.last("run-as") or owner_of(Path(_first_model(options) or sys.executable), os.environ)
    if via == "compose":
        about |= {"gpus": _gpus(words.last("gpus")), "replicas": _replicas(replicas)}
    names = settings.options.served_model_name
    name = words.last("name") or disk.name_for(names[0] if names else settings.options.model or "pagoda")
    folder = (system_folder() if via == "systemd" and not user else own_folder()) / disk.check_name(name)
    secrets = service_secrets(settings, os.environ, here=via != "compose")
    return Service(name=name, via=via, folder=folder, options=options, secrets=secrets, about=about)


def _first_model(options: Mapping[str, Any]) -> str | None:
    return (options["models"][0] if "models" in options else options).get("model")


def _gpus(given: str | None) -> str | None:
    if given is not None and given != "all" and (given == "0" or not given.replace(",", "").isdigit()):
        raise ConfigError(
            f"--gpus {given} names no GPUs", remedy="Give all, how many, or which: 0,1 (only the first: 0,)"
        )
    return given


def _replicas(given: str) -> int:
    if not given.isdigit() or not 1 <= int(given) <= 64:
        raise ConfigError(f"--replicas {given} is no number from 1 to 64", remedy="Such as: --replicas 2")
    return int(given)


def _all() -> list[Service]:
    return list(disk.saved([system_folder(), own_folder()]))


def _find(name: str | None) -> Service:
    found = [one for one in _all() if name in (None, one.name)]
    if not found:
        what = f"There is no service {name}" if name else "There is no service yet"
        raise ConfigError(what, remedy="See: pagoda service status; install one: pagoda service install MODEL")
    if len(found) > 1 and name is None:
        raise ConfigError("There are several services", remedy=f"Name one: {', '.join(one.name for one in found)}")
    return found[0]


def _change(verb: str, service: Service) -> int:
    manager = manager_of(service)
    if verb == "stop":
        manager.stop(service)
        print(f"{service.name} is stopped")
    elif verb == "uninstall":
        manager.remove(service)
        shutil.rmtree(service.folder)
        print(f"{service.name} is gone; its model is still there")
    else:
        manager.check()
        was = manager.state(service).detail
        getattr(manager, verb)(service)
        return _wait(service, manager, was)
    return 0


def _wait(service: Service, manager: Manager, was: str) -> int:
    """Until it answers, or has failed; Ctrl-C leaves it starting. `was`: what it said before."""
    shown = was
    begin = time.monotonic()
    while (waited_s := time.monotonic() - begin) < disk.START_LIMIT_S:
        state = manager.state(service)
        if state.word == "running" and health(service.url) == "ready":
            print(f"{service.name} answers at {service.url}/v1")
            return 0
        if state.word == "failed" or (state.word == "stopped" and waited_s > _GRACE_S):
            for line in manager.tail(service, 12):
                print(f"  {line}", file=sys.stderr)
            raise ConfigError(
                f"{service.name} did not start: {last_error(manager.tail(service, 50)) or state.detail or state.word}",
                remedy=f"All it said: pagoda service logs {service.name} -n 200",
            )
        if state.detail and state.detail != shown:
            print(f"  {state.detail}", file=sys.stderr)
            shown = state.detail
        time.sleep(_POLL_S)
    raise ConfigError(f"{service.name} is still starting", remedy=f"See: pagoda service logs {service.name} -f")


def _logs(service: Service, lines: str, *, follow: bool) -> int:
    if not lines.isdigit():
        raise ConfigError(f"-n {lines} is no number of lines", remedy="Such as: -n 100")
    manager = manager_of(service)
    if follow:
        return subprocess.run(manager.follow(service, int(lines)), check=False).returncode
    for line in manager.tail(service, int(lines)):
        print(line)
    return 0


@dataclasses.dataclass(frozen=True)
class Status:
    """What `pagoda service status` tells of one service."""

    name: str
    via: str
    state: str
    detail: str
    pid: int | None
    uptime_s: float | None
    url: str
    memory_bytes: int | None
    running: int | None
    waiting: int | None
    tokens_per_second: float | None
    last_error: str


def status_of(service: Service, *, measure_s: float = 1.0) -> Status:
    """How it is now; tokens are counted for `measure_s`."""
    manager = manager_of(service)
    state = manager.state(service)
    told: dict[str, float] = {}
    if state.word == "running":
        try:
            told = _measured(service, measure_s)
        except CannotAsk as error:
            answers = health(service.url) == "ready"  # and has a key that this user may not read
            state = State(
                "running" if answers else "running, does not answer",
                state.pid,
                state.since_s,
                f"{error.message}. {error.remedy}" if answers else state.detail,
            )
    whole = {name: int(told[name]) if name in told else None for name in ("memory", "running", "waiting")}
    return Status(
        name=service.name,
        via=service.via,
        state=state.word,
        detail=state.detail,
        pid=state.pid,
        uptime_s=None if state.since_s is None else max(0.0, time.time() - state.since_s),
        url=service.url,
        memory_bytes=whole["memory"],
        running=whole["running"],
        waiting=whole["waiting"],
        tokens_per_second=told.get("rate"),
        last_error=last_error(manager.tail(service, 500)),
    )


def _measured(service: Service, measure_s: float) -> dict[str, float]:
    before = sample(service.url, _key(service))
    time.sleep(measure_s)
    now = sample(service.url, _key(service))
    model = now.models[0] if now.models else ""
    return {
        "memory": now.get("process_resident_memory_bytes") + now.get("pagoda:engine_resident_memory_bytes", model),
        "running": now.get("vllm:num_requests_running", model),
        "waiting": now.get("vllm:num_requests_waiting", model),
        "rate": now.rate("vllm:generation_tokens_total", before, model),
    }


def _key(service: Service) -> str:
    try:
        keys = disk.read_secrets(service.secrets_path).get("PAGODA_API_KEY", "")
    except OSError:  # of another user
        keys = os.environ.get("PAGODA_API_KEY", "")
    return keys.split(",")[0]


def last_error(lines: Sequence[str]) -> str:
    """The last line of a log that tells of an error."""
    marks = (" error   ", " critical ", "pagoda: ", "Watchdog timeout", "Main process exited, code=killed")
    return next((line.strip() for line in reversed(lines) if any(mark in line for mark in marks)), "")


def _status(name: str | None, *, as_json: bool) -> int:
    found = [_find(name)] if name else _all()
    statuses = [status_of(one) for one in found]
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in statuses], indent=1, ensure_ascii=False))
    elif not statuses:
        print("No services yet. Install one: pagoda service install MODEL")
    for one in statuses if not as_json else ():
        print(f"{one.name}: {one.state} ({one.via})\n{table(_rows(one))}")
    return int(any(not one.state == "running" for one in statuses)) if name else 0


def _rows(one: Status) -> list[tuple[str, str]]:
    rows = [("address", f"{one.url}/v1")]
    if one.pid is not None:
        rows.append(("process", str(one.pid)))
    if one.uptime_s is not None:
        rows.append(("for", _span(one.uptime_s)))
    if one.memory_bytes is not None:
        rows.append(("memory", size(one.memory_bytes)))
        rows.append(("requests", f"{one.running} running, {one.waiting} waiting"))
        rows.append(("speed", f"{one.tokens_per_second or 0:.1f} tokens/s"))
    elif one.detail:
        rows.append(("it says", one.detail))
    if one.last_error:
        rows.append(("last error", one.last_error))
    return rows


def _span(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"
