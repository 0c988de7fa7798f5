"""Attention of prompts by FlashInfer: where it is installed, gives what the own kernel gives, and is faster."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagoda.arch.memory import blocks_for
from pagoda.backend.torch.batch import Batch, Heads, OnHost
from pagoda.backend.torch.device import Device
from pagoda.backend.torch.kernels import attention
from pagoda.backend.torch.model import Decoder
from pagoda.backend.torch.upload import Fed, upload_batch
from pagoda.errors import ConfigError
from pagoda.types import BLOCK_SIZE

FLASHINFER = "FLASHINFER"
OWN = "the own kernel"
_MODULE = "flashinfer"
_WORKSPACE_BYTES = 128 << 20
_HEAD_DIMS = (64, 128, 256)
_TYPES = (torch.float16, torch.bfloat16)
_MOST_TOKENS = 4096
_ROUNDS = 5
_TOLERANCE = 0.01
"""The root mean square of the difference to what the own kernel gives, by that of this: half a digit of bfloat16."""

_log = logging.getLogger(__name__)


class Shape(NamedTuple):
    """What a plan of FlashInfer is for; the layers that have it share the plan of a step."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    soft_cap: float | None


def shape_of(h: Heads) -> Shape:
    return Shape(h.heads, h.kv_heads, h.head_dim, h.scale, h.window, h.soft_cap)


class Turns:
    """Two wrappers that take turns. A plan is written to pinned memory of its wrapper, from where it is copied behind
    the steps under way: a wrapper is planned again once its last copy is done."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._wrappers = [make(), make()]
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def planned(self, device: torch.device, plan: Callable[[Any], object]) -> Any:
        self._wrappers.reverse()
        self._copied.reverse()
        if self._copied[0] is not None:
            self._copied[0].synchronize()
        plan(self._wrappers[0])
        self._copied[0] = there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record(torch.cuda.current_stream(device))
        return self._wrappers[0]


class Flash:
    """FlashInfer for layers of some shapes. After anything that it raises the own kernel does all."""

    def __init__(self, module: Any, device: torch.device, shapes: Iterable[Shape]) -> None:
        self.shapes, self.settled = frozenset(shapes), False
        self._module, self.device = module, device
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._turns: dict[Shape, Turns] = {}

    def begun(self, batch: Batch) -> Batch:
        """The batch, its prompts given to FlashInfer."""
        step = batch.on_host
        if step is None or batch.max_query == 1 or not self.shapes or np.diff(step.starts).min(initial=1) < 1:
            return batch
        return replace(batch, prompts=FlashStep(self, step))

    def plan(self, shape: Shape, dtype: torch.dtype, step: OnHost) -> Any:
        """A wrapper made ready for a step."""
        if shape not in self._turns:
            self._turns[shape] = Turns(
                lambda: self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace, kv_layout="NHD")
            )
        pages = Pages.of(step)

        def plan(wrapper: Any) -> None:
            wrapper.plan(
                *(self._pinned(each) for each in (step.starts, pages.starts, pages.indices, pages.last)),
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                BLOCK_SIZE,
                causal=True,
                sm_scale=shape.scale,
                window_left=-1 if shape.window is None else shape.window - 1,
                logits_soft_cap=shape.soft_cap,
                q_data_type=dtype,
                kv_data_type=dtype,
                non_blocking=True,
                disable_split_kv=True,  # or sums would be cut by what else is in the batch
            )

        return self._turns[shape].planned(self.device, plan)

    def _pinned(self, values: npt.NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int32)).pin_memory()

    def fail(self, error: Exception) -> None:
        if not self.settled:
            raise error
        self.shapes = frozenset()
        _log.warning("FlashInfer failed: the own kernel computes prompts from now on. %s", _said(error))


class Pages(NamedTuple):
    """The pages of each request of a step, side by side."""

    starts: npt.NDArray[np.int32]
    indices: npt.NDArray[np.int32]
    last: npt.NDArray[np.int32]
    """How many keys there are in the last page."""

    @classmethod
    def of(cls, step: OnHost) -> Pages:
        """Single tokens are for another kernel: they get a key, and their results are written over."""
        contexts = np.where(np.diff(step.starts) == 1, 1, step.contexts)
        counts = -(-contexts // BLOCK_SIZE)
        used = np.arange(step.tables.shape[1]) < counts[:, None]
        starts = np.concatenate(([0], np.cumsum(counts)))
        return cls(
            *(each.astype(np.int32) for each in (starts, step.tables[used], contexts - (counts - 1) * BLOCK_SIZE))
        )


class FlashStep:
    """The prompts of one step. The first layer of a shape makes the plan of all that have it."""

    def __init__(self, flash: Flash, step: OnHost) -> None:
        self._flash, self._step = flash, step
        self._planned: dict[Shape, Any] = {}

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads, sinks: Tensor | None, out: Tensor
    ) -> bool:
        """Writes what the tokens of prompts get to `out`; False where that is left to the caller."""
        shape = shape_of(heads)
        if shape not in self._flash.shapes or sinks is not None or not q.dtype == k_cache.dtype == v_cache.dtype:
            return False
        try:
            if shape not in self._planned:
                self._planned[shape] = self._flash.plan(shape, q.dtype, self._step)
            # a kernel of ours may have let the next one start ahead of its end: theirs does not
            self._planned[shape].run(q.contiguous(), (k_cache, v_cache), out=out, enable_pdl=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._flash.fail(error)
            return False
        return True


def asked_for(name: str | None) -> bool | None:
    """What `--attention-backend` says of FlashInfer; None: nothing. Raises ConfigError where it is not there."""
    if name is None or name.lower() == "auto":
        return None
    forced = name.upper() == FLASHINFER
    if forced and importlib.util.find_spec(_MODULE) is None:
        raise ConfigError(
            "--attention-backend FLASHINFER: FlashInfer is not installed",
            remedy="pip install 'pagoda-llm[cuda,flashinfer]', or leave the option out",
            param="attention_backend",
        )
    return forced


def given_prompts(
    model: object, types: tuple[torch.dtype, torch.dtype], device: Device, tokens: int, forced: bool | None
) -> str:
    """Has FlashInfer compute a decoder's prompts where it is to; what was found. `types`: of the computation and of the
    cache."""
    dtype, kv_type = types
    if not device.is_gpu or not isinstance(model, Decoder) or kv_type != dtype:
        return OWN
    heads = [y.heads for y in model.layers if y.delta is None and y.latent is None and y.sinks is None]
    with torch.inference_mode():
        flash, found = choose(heads, dtype, device.device, tokens, forced)
    model.begun = None if flash is None else flash.begun
    if found != OWN:
        _log.info("attention of prompts: %s", found)
    return found


def choose(
    layers: Sequence[Heads], dtype: torch.dtype, device: torch.device, tokens: int, forced: bool | None
) -> tuple[Flash | None, str]:
    """FlashInfer for the shapes of these layers at which it gives the same in less time (`forced`: in any time), in
    steps of so many tokens; and what was found."""
    counts = Counter(shape_of(each) for each in layers if each.head_dim in _HEAD_DIMS)
    if forced is False or importlib.util.find_spec(_MODULE) is None:
        return None, OWN
    if dtype not in _TYPES or not counts:
        return None, f"{OWN} (FlashInfer has none for this model's heads, or its type)"
    try:
        flash = Flash(importlib.import_module(_MODULE), device, counts)
        heads = {shape_of(each): each for each in layers}
        tokens = min(tokens, _MOST_TOKENS)
        found = {shape: compared(flash, heads[shape], dtype, tokens, n) for shape, n in counts.items()}
    except Exception as error:  # it compiles, and is another project's
        _log.warning("FlashInfer is installed and not used: %s", _said(error))
        return None, f"{OWN} (FlashInfer failed)"
    used = {shape for shape, trial in found.items() if trial.same and (forced or trial.theirs_s < trial.ours_s)}
    flash.shapes, flash.settled = frozenset(used), True
    words = [
        f"{'FlashInfer' if shape in used else OWN} for {n} layers of window {shape.window} ({found[shape]})"
        for shape, n in counts.items()
    ]
    return flash if used else None, "; ".join(words)


class Trial(NamedTuple):
    difference: float
    ours_s: float
    theirs_s: float

    @property
    def same(self) -> bool:
        return self.difference <= _TOLERANCE

    def __str__(self) -> str:
        return f"{1e3 * self.theirs_s:.2f} ms by FlashInfer, {1e3 * self.ours_s:.2f} ms by the own kernel" + (
            "" if self.same else f", which differ by {self.difference:.1g}"
        )


def compared(flash: Flash, heads: Heads, dtype: torch.dtype, tokens: int, layers: int) -> Trial:
    """Both at so many layers of a step: a prompt, the rest of another one, and a single token."""
    device, half = flash.device, max(2, tokens // 2)
    batch, blocks = _trial_step([(half, 0), (max(2, half // 2), half // 2), (1, half)], device)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    q = values(len(batch.tokens), heads.heads, heads.head_dim)
    k, v = (values(blocks, BLOCK_SIZE, heads.kv_heads, heads.head_dim) for _ in range(2))

    def timed(begun: Callable[[Batch], Batch]) -> tuple[Tensor, float]:
        def rounds(count: int) -> Tensor:
            for _ in range(count):
                own = begun(batch)
                for _ in range(layers):
                    out = attention.paged_attention(q, k, v, own, heads)
            torch.cuda.synchronize(device)
            return out.float()

        rounds(1)  # compiles
        began = time.perf_counter()
        out = rounds(_ROUNDS)
        return out, (time.perf_counter() - began) / _ROUNDS

    (ours, ours_s), (theirs, theirs_s) = timed(lambda batch: batch), timed(flash.begun)
    difference = float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt())
    return Trial(difference if math.isfinite(difference) else math.inf, ours_s, theirs_s)


def _trial_step(requests: Sequence[tuple[int, int]], device: torch.device) -> tuple[Batch, int]:
    """Requests of (tokens, tokens before them) in scattered blocks, and how many blocks there are."""
    lengths, before = (np.array(each, np.int32) for each in zip(*requests, strict=True))
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    width = blocks_for(int((lengths + before).max()))
    slots = np.arange(len(requests), dtype=np.int32)
    blocks = len(requests) * width
    tables = np.random.default_rng(0).permutation(blocks).astype(np.int32).reshape(len(requests), width)
    fed = Fed(slots, starts, before, np.zeros(starts[-1], np.int32), tables, starts[1:] - 1)
    return upload_batch(fed, device, blocks), blocks


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
