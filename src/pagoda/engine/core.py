"""The engine without a process around it: one model, one scheduler, one executor, advanced step by step."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from pagoda.arch.dummy import open_model
from pagoda.arch.memory import usual_requests
from pagoda.arch.registry import bind, load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Capacity, Executor, Limits, Pending, Progress
from pagoda.backend.pooler import Head
from pagoda.backend.select import load_executor, resolve_device
from pagoda.engine.adapters import Adapters
from pagoda.engine.describe import describe
from pagoda.engine.draft_limits import check_speculation, speculation_of
from pagoda.engine.grammars import Grammars
from pagoda.engine.images import check_images
from pagoda.engine.looking import look
from pagoda.engine.messages import EngineStats
from pagoda.errors import BadRequest, ConfigError, EngineError, MemoryShort
from pagoda.options.engine_config import EngineConfig
from pagoda.sched.config import SchedulerConfig
from pagoda.sched.scheduler import Scheduler
from pagoda.sched.state import Grammar
from pagoda.types import BLOCK_SIZE, MOST_LOGPROBS, Delta, Request, StepPlan
from pagoda.weights.quantization import check_quantization
from pagoda.weights.source import TensorSource

if TYPE_CHECKING:
    from pagoda.engine.draft_model import DraftModel

_log = logging.getLogger(__name__)
_CUDA_SEQS, _CPU_SEQS = 256, 64
_CUDA_STEP_TOKENS, _CPU_STEP_TOKENS = 8192, 512
_CPU_STEP_TIME_TARGET_S = 0.05
_IDLE_WAIT_S = 0.005
_LEAST_KEPT = 8


@dataclass(frozen=True, slots=True)
class _Flight:
    plan: StepPlan
    pending: Pending
    started: float
    worked_s: float  # processor time of this process when it started


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
                max_num_batched_tokens=_step_tokens(config, limits, self.spec),
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
        self._head = _head(self.spec, source)
        self._grammars = Grammars(
            config.model, self._read_metadata, self.spec, bytes_else=config.load_format == "dummy"
        )
        self._refused: list[Delta] = []
        self._on_cpu = config.device == "cpu"
        self._ahead = capacity.steps_in_flight > 1  # a step is launched before the one in flight has its result
        self._flight: _Flight | None = None
        self._landed = 0.0
        self._steps = 0
        self._last_step_s = 0.0

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The GGUF key-value table of the model, {} if it has none. Read anew each time: its vocabulary is large."""
        return self._read_metadata()

    @property
    def has_work(self) -> bool:
        return bool(self._refused or self._grammars) or self._scheduler.has_work

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
                self._refused.append(refusal)

    def _refuse(self, request: Request, error: str) -> None:
        self._refused.append(Delta(request_id=request.request_id, finish_reason="error", error=error))

    def _take_grammars(self) -> None:
        """Schedule the requests whose grammars are ready; wait for one if there is nothing else to do."""
        idle = not self._refused and not self._scheduler.has_work
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
        self._refused = [delta for delta in self._refused if delta.request_id != request_id]
        self._grammars.cancel(request_id)
        self._scheduler.cancel(request_id)

    def step(self) -> list[Delta]:
        """Compute one step. One that fails ends the requests that took part in it, not the engine."""
        self.begin()
        return self.finish()

    def begin(self) -> None:
        """Launch the next step, if there is something to do; what need not be done before can be done now."""
        if self._grammars:
            self._take_grammars()
        try:
            self._refused += look(self._scheduler, self._executor)
            self._refused += self._adapters.load_next(self._scheduler, self._executor)
            if self._flight is None:
                self._flight = self._launch(self._scheduler.plan(), self._refused)
        except BaseException:
            self._give_up()
            raise
        self._scheduler.learn()

    def finish(self) -> list[Delta]:
        """What comes of the step that has begun."""
        deltas, self._refused = self._refused, []
        try:
            flight, self._flight = self._flight, None
            if flight is None:
                return deltas
            if self._ahead:
                self._flight = self._launch(self._scheduler.plan_ahead(), deltas)
            return deltas + self._land(flight)
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        self._flight = None
        self._scheduler.give_up("interrupted")

    def _launch(self, plan: StepPlan | None, deltas: list[Delta]) -> _Flight | None:
        """Start a step. One that fails at once leaves its deltas."""
        if plan is None:
            return None
        started, worked_s = time.monotonic(), time.process_time()
        with self._failing(plan, deltas):
            return _Flight(plan, self._executor.launch(plan), started, worked_s)
        return None

    def _land(self, flight: _Flight) -> list[Delta]:
        plan, result, deltas = flight.plan, None, list[Delta]()
        with self._failing(plan, deltas):
            result = flight.pending.wait()
        began, self._landed = max(flight.started, self._landed), time.monotonic()
        if result is not None:
            deltas = self._scheduler.apply(plan, result)
            work_s = time.process_time() - flight.worked_s if self._on_cpu else None
            self._scheduler.observe(plan, self._landed - began, work_s)
            if self._head is not None:
                _score(deltas, self._head)
        self._steps += 1
        self._last_step_s = time.monotonic() - began
        return deltas

    @contextmanager
    def _failing(self, plan: StepPlan, deltas: list[Delta]) -> Iterator[None]:
        """What goes wrong ends the requests of a step, and those of one behind it, not the engine."""
        try:
            yield
        except EngineError as error:
            deltas += self._scheduler.fail(plan, error.message)
            self._flight = None
        except Exception:
            # Whatever went wrong is known to the log only: a foreign text must not reach clients.
            _log.exception("step %d failed", plan.step)
            deltas += self._scheduler.fail(plan, "the engine failed in a step that computed this request")
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


def default_length(spec: ModelSpec) -> int:
    """The longest context that the model was made for."""
    trained = None if spec.pooling is None else spec.pooling.max_len
    return min(trained or spec.max_position, spec.max_position)


def resolve_limits(config: EngineConfig, spec: ModelSpec) -> Limits:
    """Put a number in place of each `auto`; ConfigError where the numbers cannot go together."""
    cuda = config.device == "cuda"
    if config.max_model_len is not None and config.max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is above {spec.max_position}, the longest context of this model",
            remedy=f"use --max-model-len {spec.max_position} or less",
            param="max_model_len",
        )
    max_num_seqs = config.max_num_seqs or usual_requests(spec, _CUDA_SEQS if cuda else _CPU_SEQS)
    step_tokens = config.max_num_batched_tokens or max(_CUDA_STEP_TOKENS if cuda else _CPU_STEP_TOKENS, max_num_seqs)
    if step_tokens < max_num_seqs:
        if config.max_num_seqs is not None:
            raise ConfigError(
                f"max_num_batched_tokens {step_tokens} is below max_num_seqs {max_num_seqs}: each running request "
                "needs one token of a step",
                remedy=f"use --max-num-batched-tokens {max_num_seqs} or more, or --max-num-seqs {step_tokens} or less",
                param="max_num_batched_tokens",
            )
        max_num_seqs = step_tokens
    max_model_len = config.max_model_len or default_length(spec)
    if spec.encoder is not None:
        step_tokens = max(step_tokens, max_model_len)
    if spec.vision is not None:  # beside what every stream needs
        step_tokens = max(step_tokens, max_num_seqs + spec.vision.at_once)
    return Limits(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        memory_share=config.memory_share,
        kv_cache_bytes=config.kv_cache_bytes,
        num_blocks=config.num_blocks,
        threads=config.threads,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        reserved_bytes=0 if cuda else config.reserved_bytes,
        enforce_eager=config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend=config.distributed_executor_backend,
        load_format=config.load_format,
        max_loras=config.max_loras,
        max_lora_rank=config.max_lora_rank,
        mmproj=config.mmproj,
        kept_states=_kept_states(config, spec, max_num_seqs),
    )


def _kept_states(config: EngineConfig, spec: ModelSpec, max_num_seqs: int) -> int:
    """Each stream of a hybrid leaves one behind its prompt and one behind its output; some go on for long."""
    return max(_LEAST_KEPT, 4 * max_num_seqs) if spec.recurrent and config.prefix_caching else 0


def _step_tokens(config: EngineConfig, limits: Limits, spec: ModelSpec) -> int:
    """The token budget of a step. An executor of an encoder is made for longer requests, each in a step of its own."""
    if spec.encoder is None:
        return limits.max_num_batched_tokens
    usual = _CUDA_STEP_TOKENS if config.device == "cuda" else _CPU_STEP_TOKENS
    return config.max_num_batched_tokens or max(usual, limits.max_num_seqs)


def step_time_target_s(config: EngineConfig) -> float | None:
    """The longest pause that a prompt may cause to running streams; None: no such limit."""
    if config.step_time_target_s is None:
        return None if config.device == "cuda" else _CPU_STEP_TIME_TARGET_S
    return config.step_time_target_s or None


def fit_context(config: EngineConfig, limits: Limits, capacity: Capacity) -> int:
    """The longest context one request can have: what was asked for, or else what the cache holds."""
    tokens = capacity.num_blocks * BLOCK_SIZE
    if tokens >= limits.max_model_len:
        return limits.max_model_len
    if config.max_model_len is None and tokens > 0:
        return tokens
    raise MemoryShort(
        f"a context of {limits.max_model_len} tokens does not fit: there is memory for a cache of {tokens} tokens",
        remedy=f"use --max-model-len {tokens} or less, or give more memory with --gpu-memory-utilization"
        if tokens
        else "give more memory with --gpu-memory-utilization, or take a smaller model",
        param="max_model_len",
    )


def _metadata(config: EngineConfig) -> Mapping[str, Any]:
    return open_model(config.model, config.load_format, config.task).metadata


def _head(spec: ModelSpec, source: TensorSource) -> Head | None:
    return Head(spec.pooling, bind(spec, source)) if spec.pooling is not None and spec.pooling.labels else None


def _score(deltas: list[Delta], head: Head) -> None:
    for delta in deltas:
        if delta.pooled is not None:
            delta.pooled = head(np.frombuffer(delta.pooled, np.float32)).tobytes()
