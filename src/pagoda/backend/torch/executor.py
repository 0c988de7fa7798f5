"""The PyTorch executor: loads a model onto a GPU (or, in tests, a CPU), sizes its cache, runs each step there."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import numpy as np
import torch

from pagoda.arch import memory
from pagoda.arch.lora import AdapterWeights, adapters_bytes
from pagoda.arch.registry import bind
from pagoda.arch.sharding import activation_bytes
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Capacity, Done, Limits, Pending, Progress
from pagoda.backend.reference import pooled_rows
from pagoda.backend.torch import flash, ops
from pagoda.backend.torch.adapters import Adapters
from pagoda.backend.torch.answer import Chosen, Returning, choose
from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.convert import Target
from pagoda.backend.torch.delta import make_states
from pagoda.backend.torch.device import Device, Room, choose_dtype, held_outside, open_device, room
from pagoda.backend.torch.encoder import Encoder, EncoderLoader
from pagoda.backend.torch.faults import errors_told, memory_told
from pagoda.backend.torch.graphs import DecodeGraphs, Recorder, padding
from pagoda.backend.torch.load import Loader
from pagoda.backend.torch.model import Decoder, KvCache
from pagoda.backend.torch.packs import FP8
from pagoda.backend.torch.size import weight_bytes
from pagoda.backend.torch.split import joined, middle, part
from pagoda.backend.torch.team import ALONE, Team
from pagoda.backend.torch.upload import Fed, Rows, decoding, upload
from pagoda.errors import EngineError
from pagoda.options.formats import KV_EIGHT_BITS
from pagoda.types import BLOCK_SIZE, Image, StepPlan, StepResult
from pagoda.weights.source import TensorSource

_log = logging.getLogger(__name__)


class Running:
    """A step that the device works on. `sampled` int64 [L] on the device: its tokens."""

    def __init__(self, plan: StepPlan, pieces: list[Chosen]) -> None:
        self._plan, self._returning = plan, Returning(pieces)
        tokens = [piece.tokens[0] for piece in pieces]
        self.sampled = tokens[0] if len(tokens) == 1 else torch.cat(tokens) if tokens else None

    def wait(self) -> StepResult:
        with errors_told(f"step {self._plan.step}"):
            return self._returning.result(self._plan)


class Pooled:
    """A step of a model that is pooled: it samples nothing."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self._hidden = hidden

    def wait(self) -> StepResult:
        with errors_told("a step"):
            return pooled_rows(self._hidden.float().cpu().numpy())


class TorchExecutor:
    """See backend.base.Executor. `launch` queues the work on the device; `wait` fetches what came of it."""

    cuda = True
    prompts_by = flash.OWN
    """Whose attention prompts get, and why."""

    def __init__(
        self, decoder: Decoder | Encoder, capacity: Capacity, device: Device, graphs: DecodeGraphs | None = None
    ) -> None:
        self.decoder = decoder
        self._graphs = graphs
        self.capacity = capacity
        self._device, self.device = device, device.device
        self._most_tokens: int | None = None
        self._sampled = torch.zeros(1, dtype=torch.int64, device=self.device)  # of the step before

    @classmethod
    @memory_told()
    def load(
        cls,
        spec: ModelSpec,
        source: TensorSource,
        limits: Limits,
        progress: Progress | None = None,
        team: Team = ALONE,
    ) -> Self:
        """Raises ConfigError (no GPU), ModelError, or, before any weight is read, MemoryShort."""
        device = open_device(cls.cuda)
        forced = flash.asked_for(limits.attention_backend) if device.is_gpu else None
        dtype = choose_dtype(limits.dtype, source.config, device)
        target = Target(device.device, dtype, limits.quantization, device.fp8)
        kv_type = FP8 if limits.kv_cache_dtype in KV_EIGHT_BITS else dtype
        spec, tensors = team.share(spec.served(limits.max_model_len), bind(spec, source))
        space = room(device, limits.memory_share)
        outside = held_outside(device) if device.is_gpu else 0
        adapters, own = None, 0
        if limits.max_loras:
            adapters, own = Adapters(device.device, dtype), adapters_bytes(spec, limits, dtype.itemsize)
        stored, work = weight_bytes(tensors, target) + own, activation_bytes(spec, limits, 1, dtype.itemsize)
        blocks = team.least(lambda: fitting(spec, limits, space, stored, work, kv_type).blocks)
        decoder: Decoder | Encoder
        if spec.encoder is None:
            loader = Loader(spec, tensors, target, adapters)
            decoder = team.joined(lambda: loader.decoder(limits.max_model_len, progress), limits.max_num_batched_tokens)
        else:
            decoder = EncoderLoader(spec, tensors, target).encoder(limits.max_model_len, progress)
        prompts_by = flash.given_prompts(decoder, (dtype, kv_type), device, limits.max_num_batched_tokens, forced)
        if device.is_gpu:
            stored, work = measured(decoder, limits, device, kv_type)
            stored, work = stored + own, work + max(0, held_outside(device) - outside)
            blocks = team.least(lambda: fitting(spec, limits, space, stored, work, kv_type).blocks)
        kept = team.least(lambda: fitting(spec, limits, space, stored, work, kv_type).kept_states)
        states = limits.max_num_seqs + kept
        decoder.caches = make_caches(spec, blocks, kv_type, device.device, states)
        kv_bytes = blocks * memory.kv_bytes_per_block(spec, kv_kind(kv_type))
        kv_bytes += states * memory.state_bytes(spec)
        name = (
            f"{'cuda' if device.is_gpu else 'torch'} ({team.count}{device.name}, {str(dtype).removeprefix('torch.')})"
        )
        graphs = None
        if device.is_gpu and spec.pooling is None and not limits.enforce_eager:
            most, length = limits.max_num_seqs, limits.max_model_len
            graphs = DecodeGraphs(
                decoder.hidden,
                Recorder(),
                most_requests=most,
                most_context=length,
                device=device.device,
                three=bool(spec.rope.sections),
                recurrent=spec.recurrent,
                team=team,
            )
        # several GPUs are told the tokens of a step by the one that has sampled them
        at_once = 2 if team is ALONE and spec.pooling is None else 1
        executor = cls(decoder, Capacity(blocks, stored, kv_bytes, work, name, at_once, kept), device, graphs)
        executor.prompts_by = prompts_by
        return executor

    def launch(self, plan: StepPlan) -> Pending:
        with errors_told(f"step {plan.step}"), torch.inference_mode():
            pending = self._launch(plan)
            if isinstance(pending, Running) and pending.sampled is not None:
                self._sampled = pending.sampled
            elif isinstance(pending, Done):
                self._sampled = torch.from_numpy(pending.wait().tokens).to(self.device)
            return pending

    def encoded(self, image: Image, most_s: float) -> bool:
        sight = self.decoder.sight if isinstance(self.decoder, Decoder) else None
        with errors_told("an image"):
            return sight is None or sight.ready(image, most_s)

    def _launch(self, plan: StepPlan) -> Pending:
        """The step whole, or where the memory does not suffice in halves; steps are never that large again.

        States that a part of a step has moved cannot be taken back: such a step is not tried again.
        """
        count = len(plan.tokens)
        cut = 0 if self.decoder.spec.recurrent else middle(plan, whole_requests=self.decoder.spec.encoder is not None)
        if not cut or self._most_tokens is None or count <= self._most_tokens:
            try:
                return self._run(plan)
            except torch.OutOfMemoryError:
                if not cut:
                    raise
                self._most_tokens = count // 2
                _log.warning("no memory for a step of %d tokens: steps are cut to %d from now on", count, count // 2)
            self.release()
        # each half is waited for: its scratch is free before the next begins
        halves = [part(plan, 0, cut), part(plan, cut, count)]
        return Done(joined(plan, [(self._launch(half).wait(), rows) for half, rows in halves]))

    def _run(self, plan: StepPlan) -> Pending:
        batch, turns = upload(plan, self._device.device, self.capacity.num_blocks)
        if plan.tokens.min(initial=0) < 0:
            batch = replace(batch, tokens=ops.told(batch.tokens, self._sampled))
        pending = self._computed(plan, batch, turns)
        self.record_wanted()
        return pending

    def _computed(self, plan: StepPlan, batch: Batch, turns: list[Rows]) -> Pending:
        if plan.images and isinstance(self.decoder, Decoder) and self.decoder.sight is not None:
            batch = replace(batch, seen=self.decoder.sight.seen(plan.images))
        hidden = self.hidden(batch)
        if self.decoder.spec.pooling is not None:
            return Pooled(hidden)
        return Running(plan, [choose(self.decoder.logits(hidden[t.first : t.last]), t, plan) for t in turns])

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The final hidden states of a batch, good until the next one."""
        hidden = self._graphs.run(batch) if self._graphs else None
        return self.decoder.hidden(batch) if hidden is None else hidden

    def width(self, plan: StepPlan | Fed) -> int:
        """The tokens that a forward pass of a plan computes, those of padding among them."""
        count = len(plan.tokens)
        return self._graphs.padded(count) if self._graphs is not None and decoding(plan) else count

    def idle(self, plan: StepPlan | Fed) -> Callable[[], object] | None:
        """What replays the graph that a plan's forward pass is, without the plan; None where it is none."""
        return self._graphs.idle(len(plan.tokens)) if self._graphs is not None and decoding(plan) else None

    def prepare(self) -> bool:
        """Record a CUDA graph."""
        size = self._graphs.next_size() if self._graphs is not None else None
        if size is not None:
            with torch.inference_mode():
                self.record(size, new=True)
        return size is not None

    def record_wanted(self) -> None:
        """The graph of the step before this, which was computed without."""
        if self._graphs is not None and self._graphs.wanted is not None:
            self.record(self._graphs.wanted, new=False)

    def record(self, size: int, *, new: bool) -> None:
        """See DecodeGraphs.record."""
        if self._graphs is not None:
            self._graphs.record(size, new=new)

    def adapt(self, place: int, weights: AdapterWeights) -> None:
        if not isinstance(self.decoder, Decoder) or self.decoder.adapters is None:
            raise EngineError("this model was loaded without room for adapters")
        with errors_told("an adapter"), torch.inference_mode():
            self.decoder.adapters.put(place, weights)

    def close(self) -> None:
        self._graphs = None
        self.decoder.caches, self.decoder.layers = [], ()
        if isinstance(self.decoder, Decoder):
            self.decoder.sight = self.decoder.begun = None
        self.release()

    def release(self) -> None:
        """Give back to the device what nothing holds any more."""
        release(self._device)


class TorchCpuExecutor(TorchExecutor):
    """The same in plain PyTorch on a CPU: how tests run it without a GPU."""

    cuda = False


def release(device: Device) -> None:
    gc.collect()
    if device.is_gpu:
        torch.cuda.empty_cache()


def fitting(spec: ModelSpec, limits: Limits, space: Room, stored: int, work: int, kv_type: torch.dtype) -> memory.Fit:
    return memory.fit(
        spec,
        replace(limits, memory_share=space.share),
        free_bytes=space.total_bytes if space.used_by else max(0, space.total_bytes - limits.reserved_bytes),
        weight_bytes=stored,
        activation_bytes=work,
        kv_type=kv_kind(kv_type),
        used_bytes=space.used_bytes,
        used_by=space.used_by,
    )


def kv_kind(kind: torch.dtype) -> memory.KvType:
    return "fp8" if kind == FP8 else "float32" if kind == torch.float32 else "float16"


def make_caches(spec: ModelSpec, blocks: int, kind: torch.dtype, device: torch.device, states: int) -> list[KvCache]:
    """Of each layer of a decoder; with room for so many `states` of requests."""
    out: list[KvCache] = []
    for layer in spec.layers if spec.encoder is None else ():
        if layer.delta is not None:
            out.append(make_states(layer.delta, states, device))
        elif (source := layer.attention.source) is not None:
            out.append(out[source])
        else:
            a = layer.attention
            shape = (blocks, BLOCK_SIZE, a.kv_heads, a.head_dim)
            keys = _zeros(shape, kind, device)
            out.append((keys, keys[..., a.turned :] if a.latent is not None else _zeros(shape, kind, device)))
    return out


def _zeros(shape: tuple[int, ...], kind: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8 if kind == FP8 else kind, device=device).view(kind)


def measured(decoder: Decoder | Encoder, limits: Limits, device: Device, kv_type: torch.dtype) -> tuple[int, int]:
    """Bytes that the weights take, and those that the largest step takes beside them and the cache."""
    release(device)
    weights = torch.cuda.memory_allocated(device.device)
    count = limits.max_num_batched_tokens
    plans = trial_steps(count, min(limits.max_num_seqs, count), limits.max_model_len)
    blocks = 1 + max(int(plan.block_tables.max()) for plan in plans)
    generating = decoder if isinstance(decoder, Decoder) and decoder.spec.pooling is None else None
    decoder.caches = make_caches(decoder.spec, blocks, kv_type, device.device, limits.max_num_seqs)
    begun = torch.cuda.memory_allocated(device.device)
    torch.cuda.reset_peak_memory_stats(device.device)
    kept = 0
    with torch.inference_mode():
        if isinstance(decoder, Decoder) and decoder.sight is not None:
            kept = decoder.sight.try_largest(limits.max_model_len)
        for plan in plans if generating else plans[:1]:
            batch, turns = upload(plan, device.device, blocks)
            hidden = decoder.hidden(replace(batch, tokens=ops.told(batch.tokens, batch.cells)))
            for turn in turns if generating else ():
                choose(decoder.logits(hidden[turn.first : turn.last]), turn, plan)
        if generating:  # a single stream has kernels of its own
            generating.logits(generating.hidden(_padding(generating, 1, limits, device)))
    torch.cuda.synchronize(device.device)
    work = torch.cuda.max_memory_reserved(device.device) - begun + kept
    if generating and not limits.enforce_eager:
        work += graph_bytes(generating, limits, device)
    decoder.caches = []
    release(device)
    return weights, work


def graph_bytes(decoder: Decoder, limits: Limits, device: Device) -> int:
    """What the largest decode step takes: the graphs of all sizes share a pool of their own, that large."""
    release(device)
    begun = torch.cuda.memory_allocated(device.device)
    torch.cuda.reset_peak_memory_stats(device.device)
    with torch.inference_mode():
        decoder.hidden(_padding(decoder, limits.max_num_seqs, limits, device))
    torch.cuda.synchronize(device.device)
    return torch.cuda.max_memory_reserved(device.device) - begun


def _padding(decoder: Decoder, requests: int, limits: Limits, device: Device) -> Batch:
    spec = decoder.spec
    three, recurrent = bool(spec.rope.sections), spec.recurrent
    return padding(requests, limits.max_model_len, device.device, three=three, recurrent=recurrent)


def trial_steps(tokens: int, requests: int, max_model_len: int) -> tuple[StepPlan, ...]:
    """The largest step, and smaller ones whose tokens are drawn otherwise: with them all kinds of kernels are compiled
    that prompts take, before anyone waits for it."""
    first, second, third = (
        largest_step(count, min(requests, count), max_model_len)
        for count in (tokens, max(1, tokens // 4), max(1, tokens // 16))
    )
    return first, replace(second, top_p=np.ones_like(second.top_p)), replace(third, temperature=third.temperature * 0)


def largest_step(tokens: int, requests: int, max_model_len: int) -> StepPlan:
    """Prompts of `requests` that fill a step, all in the same few blocks; each is sampled in the dearest way."""
    lengths = np.full(requests, tokens // requests, np.int32)
    lengths[0] += tokens - int(lengths.sum())
    lengths = np.minimum(lengths, max_model_len)
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    ints, floats = np.zeros(requests, np.int32), np.ones(requests, np.float32)
    nothing = np.zeros(0, np.int32)
    width = memory.blocks_for(int(lengths.max()))
    return StepPlan(
        step=0,
        slots=np.arange(requests, dtype=np.int32),
        starts=starts,
        positions=ints,
        tokens=np.zeros(int(starts[-1]), np.int32),
        block_tables=np.tile(np.arange(width, dtype=np.int32), (requests, 1)),
        rows=starts[1:] - 1,
        row_request=np.arange(requests, dtype=np.int32),
        row_target=np.full(requests, -1, np.int32),
        row_top=np.full(requests, 20, np.int32),
        row_mask=ints - 1,
        temperature=floats,
        top_k=ints,
        top_p=floats * np.float32(0.9),
        min_p=floats * np.float32(0.1),
        presence=floats * 0,
        frequency=floats * 0,
        repetition=floats,
        seed=np.zeros(requests, np.uint64),
        history_start=np.zeros(requests + 1, np.int32),
        history_ids=nothing,
        history_counts=nothing,
        bias_start=np.zeros(requests + 1, np.int32),
        bias_ids=nothing,
        bias_values=np.zeros(0, np.float32),
        masks=np.zeros((0, 1), np.uint32),
    )
