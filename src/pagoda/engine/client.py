"""The server's side of the engine: keeps each stream going over the deaths of the engine process."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence

import msgspec

from pagoda.backend.base import Progress
from pagoda.engine.deaths import Deaths
from pagoda.engine.images import SentImages
from pagoda.engine.link import Link, describe_exit
from pagoda.engine.messages import (
    Cancel,
    EngineStats,
    FromEngine,
    LoadFailed,
    Loading,
    ModelInfo,
    Ping,
    Ready,
    Step,
)
from pagoda.engine.roster import Roster
from pagoda.engine.spawn import COMMAND, EngineProcess
from pagoda.engine.stream import DeltaStream, Stream
from pagoda.errors import ConfigError, EngineError, MemoryShort, ModelError, Overloaded, PagodaError
from pagoda.options.engine_config import EngineConfig
from pagoda.sched.stats import SchedulerStats
from pagoda.types import Request

MAX_DEATHS = 5
HANG_LIMIT_S = 60.0
_DEATHS_BEFORE_READY = 2
_TICKS_PER_LIMIT = 8
_LOAD_LIMIT_S = 1800.0
_SLOWEST_OPS_PER_S = 5e9
_DUMP_S = 0.2
_LOAD_ERRORS: dict[str, type[PagodaError]] = {e.__name__: e for e in (ConfigError, ModelError, MemoryShort)}
_NO_SCHEDULE = SchedulerStats(
    running=0,
    waiting=0,
    blocks_used=0,
    blocks_total=0,
    prefix_queries_tokens=0,
    prefix_hits_tokens=0,
    preemptions=0,
    prompt_tokens=0,
    generation_tokens=0,
)

_log = logging.getLogger(__name__)


class EngineClient:
    """Starts the engine, sends it requests, and starts it again when it dies; all in one event loop.

    `on_dead` is called once, with the reason, when the engine died too often to be started again: the server then
    ends with exit code 70. `max_queued` is the last bound on memory: the API admits whole calls, by a smaller one.
    `command` is the engine's command line without the file descriptor (tests put their own); `process` is its first
    life, where that was started before; `environ` is what its environment has beside ours. `on_change` is called when
    the engine begins to take requests, and when it no longer does.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = COMMAND,
        process: EngineProcess | None = None,
        environ: Mapping[str, str] | None = None,
        max_queued: int = 8192,
        hang_limit_s: float = HANG_LIMIT_S,
        backoff_s: float = 1.0,
        on_dead: Callable[[str], None] | None = None,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self.ready = False
        self.dead = False
        self.restarts = 0
        self.on_dead = on_dead
        self.on_change = on_change
        self._config = config
        self._command = tuple(command)
        self._process = process
        self._environ = environ
        self._max_queued = max_queued
        self._hang_limit_s = hang_limit_s
        self._info: ModelInfo | None = None
        self._stats = EngineStats(scheduler=_NO_SCHEDULE)
        self._roster = Roster()
        self._images = SentImages()
        self._link: Link | None = None
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._on_progress: Progress | None = None
        self._load_error: PagodaError | None = None
        self._deaths = Deaths(backoff_s)
        self._silent_ticks = 0
        self._idle = False
        self._longest_step_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise RuntimeError("the engine is not loaded yet")
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The engine's last word; what waits here for an engine that is down counts as waiting."""
        schedule = self._stats.scheduler
        waiting = schedule.waiting + self._roster.waiting
        return msgspec.structs.replace(self._stats, scheduler=msgspec.structs.replace(schedule, waiting=waiting))

    @property
    def engines(self) -> tuple[EngineClient, ...]:
        return (self,)

    @property
    def load(self) -> int:
        """Requests that are here, running and waiting."""
        return len(self._roster)

    @property
    def pid(self) -> int | None:
        return None if self._link is None else self._link.pid

    @property
    def responsive(self) -> bool:
        """False when it has owed a sign of life for half the time after which it is stopped."""
        return not self.dead and self._silent_s <= self._patience_s() / 2

    def spawn(self) -> None:
        """Start the process now, before there is a loop; `start` does it otherwise."""
        if self._link is None:
            self._link = Link(self._config, self._command, self._process, self._environ)

    async def start(self, on_progress: Progress | None = None) -> None:
        """Wait until the model is loaded. Raises the error that loading ended with."""
        self._on_progress = on_progress
        self.spawn()
        loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._supervise(loaded)), asyncio.create_task(self._watch())]
        await loaded

    def generate(self, request: Request) -> DeltaStream:
        """Take a request in and give its deltas. Raises Overloaded at once when too many wait or the end is near."""
        return DeltaStream(self.take(request), self.release)

    def take(self, request: Request) -> Stream:
        """`generate` for one who reads the stream himself, and calls `release`."""
        if self.dead or self._draining:
            raise Overloaded("the server is shutting down")
        places = self._max_queued + (self._info.max_num_seqs if self._info else 0)
        if len(self._roster) >= places:
            raise Overloaded(f"{len(self._roster)} requests are waiting or running; more are not taken now")
        if request.params.seed is None:  # chosen here, so that a restart draws the same tokens
            params = msgspec.structs.replace(request.params, seed=secrets.randbits(63))
            request = msgspec.structs.replace(request, params=params)
        stream = Stream(request)
        self.adopt(stream)
        return stream

    def adopt(self, stream: Stream) -> None:
        """Go on with a request that another engine had."""
        self._roster.add(stream)
        self._empty.clear()
        self._submit()

    def give_waiting(self) -> list[Stream]:
        """The requests that wait for this engine and may go on elsewhere; they are no longer here."""
        streams = self._roster.take_waiting()
        self._note_empty()
        return streams

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and let the live ones end; those that do not in time get an error. True: all ended."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            self._cancel(self._roster.end_all("the server shut down before this request was done"))
            self._note_empty()
            return False
        return True

    async def stop(self) -> None:
        """End the engine and whatever is still live."""
        self._draining = True
        hears, self.ready = self.ready, False
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._roster.end_all("the server shut down before this request was done")
        self._note_empty()
        link, self._link = self._link, None
        if link is not None:
            await link.stop(kill=not hears)

    def _submit(self) -> None:
        if not self.ready or self._link is None:
            return
        if not self._roster.sent:
            self._silent_ticks = 0
        for request in self._roster.due():
            self._idle = False
            for message in self._images.messages(request):
                self._link.send(message)

    def _cancel(self, wire_ids: list[str]) -> None:
        for wire_id in wire_ids:
            if self._link is not None:
                self._link.send(Cancel(wire_id))

    def _forget_images(self) -> None:
        gone = self._images.unneeded(self._roster.is_sent)
        if gone is not None and self._link is not None:
            self._link.send(gone)

    def release(self, stream: Stream) -> None:
        """The consumer wants no more of this request."""
        wire_id = self._roster.remove(stream)
        if wire_id is not None:
            self._cancel([wire_id])
            self._submit()
            self._forget_images()
        self._note_empty()

    def _note_empty(self) -> None:
        if not len(self._roster):
            self._empty.set()

    def _hear(self, message: FromEngine, alone: bool) -> None:
        self._silent_ticks = 0
        match message:
            case Step(deltas, stats):
                self._stats = stats
                self._idle = not (self._roster.sent or stats.scheduler.running or stats.scheduler.waiting)
                self._longest_step_s = max(self._longest_step_s, stats.last_step_s)
                for delta in deltas:
                    if cancelled := self._roster.deliver(delta, alone=alone):
                        self._cancel(cancelled)
                self._submit()
                self._forget_images()
                self._note_empty()
            case Loading(phase, share):
                if self._on_progress is not None:
                    self._on_progress(phase, share)
            case Ready(info):
                self._info = info
                self._load_error = None
                self.ready = True
                self._submit()
                self._tell()
            case LoadFailed(kind, text, remedy, exit_code):
                self._load_error = _LOAD_ERRORS.get(kind, EngineError)(text, remedy=remedy)
                self._load_error.exit_code = exit_code

    async def _supervise(self, loaded: asyncio.Future[None]) -> None:
        try:
            await self._live_and_die(loaded)
        except Exception as error:
            _log.exception("the engine cannot be kept running")
            self._give_up("the server failed to keep the engine running", loaded, error)

    async def _live_and_die(self, loaded: asyncio.Future[None]) -> None:
        """The engine's lives, one after the other, until it is given up."""
        while True:
            link = self._link
            if link is None:
                link = self._link = Link(self._restart_config(), self._command, environ=self._environ)
            await link.connect(lambda message, alone: self._hear_first(message, alone, loaded))
            await link.lost.wait()
            self._take_back()
            cause = describe_exit(await link.reap())
            self._link = None
            self._deaths.count()
            reason = self._hopeless(cause, first=not loaded.done())
            if reason is not None:
                self._give_up(reason.message, loaded, reason)
                return
            delay_s = self._deaths.wait_s
            _log.error("the engine stopped (%s); it starts again in %g s", cause, delay_s)
            await asyncio.sleep(delay_s)
            self.restarts += 1

    def _restart_config(self) -> EngineConfig:
        """The context that clients were told of must hold, even if less memory is free now."""
        if self._info is None:
            return self._config
        config = msgspec.structs.replace(self._config, max_model_len=self._info.max_model_len)
        if not config.reserved_bytes:
            return config
        # What was for others then is taken by them now.
        return msgspec.structs.replace(config, reserved_bytes=0, kv_cache_bytes=self._info.kv_bytes)

    def _hear_first(self, message: FromEngine, alone: bool, loaded: asyncio.Future[None]) -> None:
        self._hear(message, alone)
        if self.ready and not loaded.done():
            loaded.set_result(None)

    def _take_back(self) -> None:
        self.ready = False
        self._roster.engine_died(self._info.max_num_seqs if self._info else 0)
        self._images.clear()
        self._note_empty()
        self._stats = EngineStats(scheduler=_NO_SCHEDULE)
        self._longest_step_s = 0.0
        self._silent_ticks = 0
        self._idle = False
        self._tell()

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _hopeless(self, cause: str, first: bool) -> PagodaError | None:
        """Why the engine is not started again, None if it is."""
        if first and self._load_error is not None:
            return self._load_error
        if first and len(self._deaths) >= _DEATHS_BEFORE_READY:
            return EngineError(
                f"the engine process ended with {cause} while it loaded the model",
                remedy="signal SIGKILL is mostly the system short of memory: `dmesg` tells; take a smaller model"
                if cause.endswith("SIGKILL")
                else "the log above says where",
            )
        if len(self._deaths) > MAX_DEATHS:
            last = self._load_error.message if self._load_error else cause
            return EngineError(f"the engine stopped {len(self._deaths)} times in ten minutes (last: {last})")
        return None

    def _give_up(self, reason: str, loaded: asyncio.Future[None], error: Exception) -> None:
        self.ready = False
        self.dead = True
        self._tell()
        self._roster.end_all("the engine stopped and could not be started again")
        self._note_empty()
        if not loaded.done():
            loaded.set_exception(error)
        elif self.on_dead is not None:
            self.on_dead(reason)

    async def _watch(self) -> None:
        """Restart an engine that gives no sign. Ticks, not clocks: that the server slept is no proof.

        An engine that works or loads speaks by itself; one without work is asked.
        """
        while True:
            await asyncio.sleep(self._tick_s)
            link = self._link
            if link is None:
                self._silent_ticks = 0
                continue
            if self.ready and not self._roster.sent:
                link.send(Ping())
            self._silent_ticks += 1
            if self._silent_s > self._patience_s():
                _log.error("the engine gave no sign of life for %.0f s; it is stopped", self._silent_s)
                self.ready = False
                link.dump_stacks()
                await asyncio.sleep(_DUMP_S)
                link.kill()

    @property
    def _tick_s(self) -> float:
        return self._hang_limit_s / _TICKS_PER_LIMIT

    @property
    def _silent_s(self) -> float:
        return self._silent_ticks * self._tick_s

    def _patience_s(self) -> float:
        """The hang limit, and more where one step may take long by itself: a large model on a slow machine."""
        if not self.ready:
            return _LOAD_LIMIT_S
        if self._idle:
            return self._hang_limit_s
        info = self.info
        guess_s = 0.0
        if info.device.startswith(("cpu", "reference")):
            guess_s = 2.0 * info.weight_bytes * info.max_num_batched_tokens / _SLOWEST_OPS_PER_S
        return max(self._hang_limit_s, 10.0 * self._longest_step_s, guess_s)
