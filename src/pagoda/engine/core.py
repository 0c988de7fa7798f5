"""The engine without a process around it: one model, one scheduler, one executor, advanced step by step."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from pagoda.arch.dummy import open_model
from pagoda.arch.registry import load_spec
from pagoda.backend.base import Capacity, Executor, Pending, Progress
from pagoda.backend.pooler import Head, head
from pagoda.backend.select import load_executor, resolve_device
from pagoda.engine.adapters import Adapters
from pagoda.engine.describe import describe
from pagoda.engine.draft_limits import check_speculation, speculation_of
from pagoda.engine.grammars import Grammars
from pagoda.engine.images import check_images
from pagoda.engine.limits import fit_context, resolve_limits, step_time_target_s, step_tokens
from pagoda.engine.looking import look
from pagoda.engine.messages import EngineStats
from pagoda.errors import BadRequest, EngineError
from pagoda.options.engine_config import EngineConfig
from pagoda.sched.config import SchedulerConfig
from pagoda.sched.scheduler import Scheduler
from pagoda.sched.state import Grammar
from pagoda.types import MOST_LOGPROBS, Delta, Request, StepPlan, StepResult
from pagoda.weights.quantization import check_quantization

if TYPE_CHECKING:
    from pagoda.engine.draft_model import DraftModel

_log = logging.getLogger(__name__)
T = TypeVar("T")
_IDLE_WAIT_S = 0.005


@dataclass(frozen=True, slots=True)
class _Flight:
    plan: StepPlan
    pending: Pending
    started: float
    worked_s: float  # processor time of this process when it started


@dataclass(frozen=True, slots=True)
class _Done:
    plan: StepPlan
    result: StepResult
    seconds: float
    work_s: float | None


class EngineCore:
    """Loads on construction (ConfigError, ModelError or MemoryShort say why not). Not thread-safe: one caller."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        started = time.monotonic()
        self._read_metadata = partial(_metadata, config)
        source = open_model(config.model, config.load_format, config.task, mmproj=config.mmproj)
        self.spec = load_spec(source, config.task)
        config = msgspec.structs.replace(config, device=resolve_device(config.device, self.spec))
        check_quantization(source, config.quantization, gpu=config.device in ("cuda", "torch-cpu"))
        check_speculation(config.speculation, self.spec)
        adapters = Adapters(config, self.spec, gguf=bool(source.metadata))
        limits = resolve_limits(config, self.spec)
        self._drafts: DraftModel | None = None
        if config.speculation is not None and config.speculation.model is not None:
            # Imported only now: it compares vocabularies, with the tokenizer that no other engine needs.
            kind = importlib.import_module("pagoda.engine.draft_model").DraftModel
            self._drafts = kind(config.speculation, config.device, limits, source, self.spec)
            limits = replace(limits, reserved_bytes=limits.reserved_bytes + self._drafts.unseen_bytes)
        self._executor = load_executor(config.device, self.spec, source, limits, progress)
        capacity = self._executor.capacity if self._drafts is None else _both(self._executor, self._drafts)
        max_model_len = fit_context(config, limits, capacity)
        self.info = describe(config, limits, capacity, self.spec, source, max_model_len, started)
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=capacity.num_blocks,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=step_tokens(config, limits, self.spec),
                max_model_len=max_model_len,
                vocab_size=self.spec.vocab_size,
                prefix_caching=config.prefix_caching and self.spec.encoder is None,
                recurrent=self.spec.recurrent,
                kept_states=capacity.kept_states,
                step_time_target_s=step_time_target_s(config),
                speculation=speculation_of(config.speculation, self.spec, capacity.steps_in_flight),
                pooling=None if self.spec.pooling is None else self.spec.pooling.kind,
                whole_prompts=self.spec.encoder is not None,
                vision=self.spec.vision,
                max_loras=limits.max_loras,
            ),
            self._drafts,
            lambda image: self._executor.encoded(image, 0.0),
        )
        self._adapters = adapters
        adapters.begin(self._scheduler, self._executor)
        self._head = head(self.spec, source)
        self._grammars = Grammars(
            config.model, self._read_metadata, self.spec, bytes_else=config.load_format == "dummy"
        )
        self._told: list[Delta] = []
        self._on_cpu = config.device == "cpu"
        self._ahead = capacity.steps_in_flight > 1  # a step is launched before the one in flight has its result
        self._flight: _Flight | None = None
        self._done: _Done | None = None
        self._landed = 0.0
        self._steps = 0
        self._last_step_s = 0.0

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The GGUF key-value table of the model, {} if it has none. Read anew each time: its vocabulary is large."""
        return self._read_metadata()

    @property
    def has_work(self) -> bool:
        return bool(self._told or self._grammars) or self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. One that cannot be run ends with an error in the next step; nothing is raised."""
        try:
            self._check(request)
        except BadRequest as error:
            self._refuse(request, error.message)
            return
        if request.params.grammar:
            self._grammars.start(request)
        else:
            self._schedule(request)

    def _schedule(self, request: Request, grammar: Grammar | None = None) -> None:
        try:
            refusal = self._scheduler.add(request, grammar)
        except ValueError:
            _log.exception("request %s refused", request.request_id)
            self._refuse(request, "the engine cannot take this request")
        else:
            if refusal is not None:
                self._told.append(refusal)

    def _refuse(self, request: Request, error: str) -> None:
        self._told.append(Delta(request_id=request.request_id, finish_reason="error", error=error))

    def _take_grammars(self) -> None:
        """Schedule the requests whose grammars are ready; wait for one if there is nothing else to do."""
        idle = not self._told and not self._scheduler.has_work
        for request, matcher in self._grammars.take(_IDLE_WAIT_S if idle else 0.0):
            if isinstance(matcher, str):
                self._refuse(request, matcher)
            else:
                self._schedule(request, matcher)

    def _check(self, request: Request) -> None:
        """The server has checked all this; an executor that trusts it would read outside its tables."""
        size = self.spec.vocab_size
        request.params.check(size, MOST_LOGPROBS)
        for ids in (request.prompt_token_ids, request.output_token_ids):
            if ids and not (min(ids) >= 0 and max(ids) < size):
                raise BadRequest(f"the prompt holds a token id outside 0..{size - 1}", param="prompt")
        check_images(request, self.spec.vision)
        self._adapters.check(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request; no delta follows."""
        self._told = [delta for delta in self._told if delta.request_id != request_id]
        self._grammars.cancel(request_id)
        self._scheduler.cancel(request_id)

    def step(self) -> list[Delta]:
        """Compute one step. One that fails ends the requests that took part in it, not the engine."""
        told = self.begin()
        self.wait()
        try:
            self._apply()
        except BaseException:
            self._give_up()
            raise
        return told + self._take_told()

    def begin(self) -> list[Delta]:
        """Launch the next step, if there is something to do; what came of the one before."""
        if self._grammars:
            self._take_grammars()
        try:
            if not self._follow():
                self._apply()
                self._told += look(self._scheduler, self._executor)
                self._told += self._adapters.load_next(self._scheduler, self._executor)
                if self._flight is None:
                    self._flight = self._launch(self._scheduler.plan())
        except BaseException:
            self._give_up()
            raise
        self._scheduler.learn()
        return self._take_told()

    def wait(self) -> None:
        """Until the step that has begun is done. What came of it, the next `begin` tells."""
        flight = self._flight
        if flight is None or self._done is not None:  # what came of the one before is not taken yet
            return
        plan, self._flight = flight.plan, None
        try:
            if self._ahead:
                self._flight = self._launch(self._scheduler.plan_ahead())
            result = self._trying(plan, flight.pending.wait)
        except BaseException:
            self._give_up()
            raise
        began, self._landed = max(flight.started, self._landed), time.monotonic()
        self._steps += 1
        self._last_step_s = self._landed - began
        if result is not None:
            work_s = time.process_time() - flight.worked_s if self._on_cpu else None
            self._done = _Done(plan, result, self._last_step_s, work_s)

    def _take_told(self) -> list[Delta]:
        told, self._told = self._told, []
        return told

    def _follow(self) -> bool:
        """Launch a step that only goes on with the one that is done, whose result is applied while it runs."""
        done = self._done
        if done is None or self._ahead or not self._scheduler.follow(done.plan, done.result):
            return False
        self._done = None
        self._flight = self._launch(done.plan)
        self._told += self._scheduler.tell()
        self._scheduler.observe(done.plan, done.seconds, done.work_s)
        return True

    def _apply(self) -> None:
        """What came of the step that is done."""
        done, self._done = self._done, None
        if done is None:
            return
        deltas = self._scheduler.apply(done.plan, done.result)
        self._scheduler.observe(done.plan, done.seconds, done.work_s)
        if self._head is not None:
            _score(deltas, self._head)
        self._told += deltas

    def _give_up(self) -> None:
        self._flight = self._done = None
        self._scheduler.give_up("interrupted")

    def _launch(self, plan: StepPlan | None) -> _Flight | None:
        """Start a step. Of one that fails at once its requests are told."""
        if plan is None:
            return None
        started, worked_s = time.monotonic(), time.process_time()
        pending = self._trying(plan, self._executor.launch, plan)
        return None if pending is None else _Flight(plan, pending, started, worked_s)

    def _trying(self, plan: StepPlan, work: Callable[..., T], *arguments: object) -> T | None:
        """What goes wrong ends the requests of a step, and those of one behind it, not the engine."""
        try:
            return work(*arguments)
        except EngineError as error:
            self._fail(plan, error.message)
        except Exception:
            # Whatever went wrong is known to the log only: a foreign text must not reach clients.
            _log.exception("step %d failed", plan.step)
            self._fail(plan, "the engine failed in a step that computed this request")
        return None

    def _fail(self, plan: StepPlan, message: str) -> None:
        self._told += self._scheduler.tell() + self._scheduler.fail(plan, message)
        self._flight = None

    def prepare(self) -> bool:
        """While nothing is asked: see backend.base.Executor."""
        return self._flight is None and self._executor.prepare()

    def stats(self) -> EngineStats:
        return EngineStats(scheduler=self._scheduler.stats(), steps=self._steps, last_step_s=self._last_step_s)

    def close(self) -> None:
        self._grammars.close()
        self._executor.close()
        if self._drafts is not None:
            self._drafts.close()


def _both(executor: Executor, drafts: DraftModel) -> Capacity:
    """What the model takes together with its draft model."""
    own, more = executor.capacity, drafts.capacity
    return replace(
        own,
        weight_bytes=own.weight_bytes + more.weight_bytes,
        kv_bytes=own.kv_bytes + more.kv_bytes,
        activation_bytes=own.activation_bytes + more.activation_bytes,
    )


def _metadata(config: EngineConfig) -> Mapping[str, Any]:
    return open_model(config.model, config.load_format, config.task).metadata


def _score(deltas: list[Delta], head: Head) -> None:
    for delta in deltas:
        if delta.pooled is not None:
            delta.pooled = head(np.frombuffer(delta.pooled, np.float32)).tobytes()
