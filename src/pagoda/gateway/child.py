"""One model's own server, as a child process: it is started, becomes ready, leaves, and may fail in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pagoda.errors import MemoryShort, ModelError, Overloaded, PagodaError
from pagoda.gateway.policy import Seen, State, keep_alive_s
from pagoda.gateway.sizes import Sized
from pagoda.gateway.wire import Place
from pagoda.options.config import Options, declared

COMMAND = (sys.executable, "-P", "-m", "pagoda.cli.child")
WATCHDOG_S = 120.0
LOADING_SILENCE_S = 1800.0
"""Loading may take as long as it must, but it tells how far it is."""
STOP_S = 10.0
AFTER_FAILURE_S = 5.0
_PROGRESS_S = 5.0
_LAST_LINES = 20
_OF_THE_GATEWAY = (
    "host", "port", "uds", "api_key", "max_requests_per_key", "root_path", "allowed_origins", "log_file", "keep_alive",
    "models", "upstream", "fallback", "fallback_model", "allowed_methods", "allowed_headers", "allow_credentials",
    "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers",
)  # fmt: skip
_ANY_KEY = "gateway"
"""Of a child whose gateway needs none; only our user can reach a child's socket."""
_KINDS: Mapping[int, type[PagodaError]] = {ModelError.exit_code: ModelError, MemoryShort.exit_code: MemoryShort}

log = logging.getLogger("pagoda.gateway")


class NotLoaded(Overloaded):
    """The model could not be loaded; why is in the message."""

    code = "model_not_loaded"
    retry_after_s = 10


class Child:
    """The process, from one start to the next. `changed` is called whenever `state` has changed.

    Requests are counted by `use`; whoever counts one keeps the process until it is over. `claim` is for one that
    will need it soon. It takes the gateway's own keys: what it keeps for clients belongs to them.
    """

    def __init__(
        self, sized: Sized, folder: Path, number: int, api_keys: Sequence[str], changed: Callable[[], None]
    ) -> None:
        self.sized = sized
        self.names = tuple(sized.options.served_model_name or (sized.name,))
        self.state: State = "stopped"
        self.busy = 0
        self.waiting = 0
        self.waiting_since_s = math.inf
        self.loads = 0
        self.crashed = False
        self.usual_keep_alive_s = keep_alive_s(sized.options.keep_alive or "5m")
        self.keep_alive_s = self.usual_keep_alive_s
        self.idle_since_s = time.monotonic()
        self.failure: PagodaError | None = None
        self.failed_at_s = 0.0
        self._keyed = bool(api_keys)
        self._keys = tuple(api_keys) or (_ANY_KEY,)
        self.headers = {"authorization": f"Bearer {self._keys[0]}"}
        self.place = Place(uds=str(folder / f"{number}.sock"))
        self._config = folder / f"{number}.json"
        self._notices = folder / f"{number}.notify"
        self._claims = 0
        self._changed = changed
        self._process: asyncio.subprocess.Process | None = None
        self._life: asyncio.Task[None] | None = None
        self._last: list[str] = []
        self._heard_at_s = 0.0
        self._told_at_s = 0.0

    def seen(self) -> Seen:
        return Seen(
            self.sized.name,
            self.state,
            self.sized.need_bytes,
            self.busy + self.waiting + self._claims,
            self.idle_since_s,
            self.keep_alive_s,
            self.waiting_since_s if self.waiting else math.inf,
        )

    def credentials(self, given: Mapping[str, str]) -> Mapping[str, str]:
        """The headers with a key for a request whose client gave these."""
        return given if given and self._keyed else self.headers

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """From before a request waits for it: once loaded, it must not be unloaded before the request comes."""
        self._claims += 1
        try:
            yield
        finally:
            self._claims -= 1

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """While a request of it runs."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.idle_since_s = time.monotonic()
            if self.state == "leaving" and not self.busy:
                self._terminate()
            self._changed()

    def start(self) -> None:
        if self.state != "stopped":
            raise RuntimeError(f"{self.sized.name} is {self.state} already")
        log.info("%s: loading", self.sized.name)
        self.failure = None
        self.crashed = False
        self._set("loading")
        self._life = asyncio.create_task(self._live())
        self._life.add_done_callback(self._broken)

    def leave(self) -> None:
        """Take no more requests; stop when those that are here are over."""
        if self.state == "ready":
            log.info("%s: unloading%s", self.sized.name, f" after {self.busy} running requests" if self.busy else "")
            self._set("leaving")
            if not self.busy:
                self._terminate()

    async def stop(self) -> None:
        """End the process now, whatever it does."""
        if self._life is None:
            return
        self._set("leaving")
        self._terminate()
        await asyncio.wait([self._life])

    def _set(self, state: State) -> None:
        self.state = state
        self._changed()

    async def _live(self) -> None:
        """One life: until the process has ended, however it did."""
        started = time.monotonic()
        self._write_config()
        with _notices(self._notices) as heard:
            loop = asyncio.get_running_loop()
            loop.add_reader(heard, lambda: self._hear(heard, started))
            try:
                self._heard_at_s = time.monotonic()
                process = self._process = await asyncio.create_subprocess_exec(
                    *COMMAND, "--config", str(self._config),
                    stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                    env=self._environment(), start_new_session=True,
                )  # fmt: skip
                if self.state == "leaving":
                    self._terminate()
                watching = asyncio.create_task(self._watch(process))
                await self._log_lines(process)
                code = await process.wait()
                watching.cancel()
            finally:
                loop.remove_reader(heard)
        self._ended(code)

    def _broken(self, life: asyncio.Task[None]) -> None:
        """An error of ours must not leave requests waiting for ever."""
        if not life.cancelled() and (error := life.exception()) is not None:
            log.error("%s: it cannot be kept running", self.sized.name, exc_info=error)
            self._last.append(str(error))
            self._ended(70)

    def _ended(self, code: int) -> None:
        asked = self.state == "leaving"
        loading = self.state == "loading"
        self._process = self._life = None
        if not asked:
            self.crashed = True
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            why = " ".join(self._last[-2:]).removeprefix("pagoda: ") if loading else ""
            log.error("%s: its server ended with %s %s", self.sized.name, how, why)
            if loading:
                self.failed_at_s = time.monotonic()
                kind = _KINDS.get(code)
                self.failure = NotLoaded(f"the model {self.sized.name} could not be loaded: {why or how}")
                self.failure.exit_code = kind.exit_code if kind else code if 0 < code < 128 else 70
        else:
            log.info("%s: unloaded", self.sized.name)
        self._set("stopped")

    def _terminate(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGTERM)
            asyncio.get_running_loop().call_later(STOP_S, _kill, process)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Its server says that the engine moves; one that says nothing for long is ended."""
        while True:
            await asyncio.sleep(WATCHDOG_S / 4)
            limit_s = LOADING_SILENCE_S if self.state == "loading" else WATCHDOG_S
            if self.state in ("loading", "ready") and time.monotonic() - self._heard_at_s > limit_s:
                log.error("%s: no sign of life for %g s; it is stopped", self.sized.name, limit_s)
                self._last.append(f"no sign of life for {limit_s:g} s")
                _kill(process)

    async def _log_lines(self, process: asyncio.subprocess.Process) -> None:
        """What it writes goes into our log, with its name in front."""
        if process.stderr is None:
            raise RuntimeError("the output of a child is no pipe")
        while True:
            try:
                line = await process.stderr.readline()
            except ValueError:  # a line without an end
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self._last = [*self._last[1 - _LAST_LINES :], text.strip()]
                log.info("%s: %s", self.sized.name, _without_time(text))

    def _hear(self, heard: socket.socket, started_s: float) -> None:
        try:
            text = heard.recv(1 << 12).decode("utf-8", "replace")
        except OSError:
            return
        told = dict(line.split("=", 1) for line in text.split("\n") if "=" in line)
        now = time.monotonic()
        if "WATCHDOG" in told or self.state == "loading":
            self._heard_at_s = now
        if "READY" in told and self.state == "loading":
            log.info("%s: ready after %.1f s", self.sized.name, now - started_s)
            self.loads += 1
            self._heard_at_s = self.idle_since_s = now
            self._set("ready")
        elif self.state == "loading" and "STATUS" in told and now - max(self._told_at_s, started_s) > _PROGRESS_S:
            self._told_at_s = now
            log.info("%s: %s", self.sized.name, told["STATUS"])

    def _write_config(self) -> None:
        options = self.sized.options
        values = {each.name: getattr(options, each.name) for each in declared() if each.name not in _OF_THE_GATEWAY}
        defaults = Options()
        given: dict[str, Any] = {name: value for name, value in values.items() if value != getattr(defaults, name)}
        given |= {"model": self.sized.path, "served_model_name": list(self.names), "uds": self.place.uds}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(str(self.place.uds))
        self._config.write_text(json.dumps(given, default=_plain), "utf-8")

    def _environment(self) -> dict[str, str]:
        """Ours, without what would be an option of the child, or is none of its business."""
        options = {variable for each in declared() for variable in each.variables}
        ours = {*options, "PAGODA_CONFIG", "PAGODA_UPSTREAM_API_KEY", "NOTIFY_SOCKET", "WATCHDOG_PID"}
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        told = {"NOTIFY_SOCKET": str(self._notices), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
        return {**kept, **told, "PAGODA_API_KEY": json.dumps(self._keys)}


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, Sequence) else str(value)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            process.kill()


def _without_time(line: str) -> str:
    """A line of a log without what ours puts in front again."""
    return line[28:] if line[4:5] == line[7:8] == "-" and line[13:14] == ":" else line


@contextlib.contextmanager
def _notices(path: Path) -> Iterator[socket.socket]:
    """The socket to which the child tells how it is."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.setblocking(False)
        made.bind(str(path))
        yield made
