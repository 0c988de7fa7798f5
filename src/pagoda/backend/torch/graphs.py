"""CUDA graphs of decode steps: a step of single tokens is replayed as one launch, in a batch padded to a few sizes.

Sizes are recorded while nothing is asked, the largest first, so that the others fit into its memory; one that a step
needs before is recorded behind that step, which runs as it is in the padded batch. So no start waits for graphs.
"""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.kernels.stage import stage
from pagoda.types import BLOCK_SIZE

_log = logging.getLogger(__name__)

Forward = Callable[[Batch], Tensor]
Replay = Callable[[], object]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records what a call does; gives a way to do it again, and the tensor that then holds its result."""


def sizes(most: int) -> tuple[int, ...]:
    """The batch sizes that are recorded: 1, 2, 4, 8, from 16 on in steps of an eighth to a quarter, up to `most`."""
    found, size = [], 1
    while size < most:
        found.append(size)
        size += size if size < 16 else max(8, 1 << (size.bit_length() - 3))
    return (*found, most)


class Recorder:
    """Records CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # a collection in the middle would free tensors of others, which a recording forbids
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        finally:
            gc.enable()
        return graph.replay, result


@dataclass(frozen=True, slots=True)
class Recorded:
    batch: Batch
    replay: Replay
    result: Tensor


class DecodeGraphs:
    """Runs batches in which every request has one token and wants its logits; leaves all others to the caller."""

    def __init__(
        self,
        forward: Forward,
        record: Record,
        *,
        most_requests: int,
        most_context: int,
        device: torch.device,
        three: bool = False,
    ) -> None:
        """`three`: tokens turn by three positions."""
        self._forward, self._record = forward, record
        self._sizes = sizes(most_requests)
        self._recorded: dict[int, Recorded] = {}
        self._fixed = padding(most_requests, most_context, device, three=three)

    def run(self, batch: Batch) -> Tensor | None:
        """The forward pass of a batch, [L, hidden], good until the next one; None where no graph is for it."""
        requests = len(batch.contexts)
        if batch.seen or batch.adapters or batch.max_query != 1 or not batch.whole:
            return None
        if not requests == len(batch.tokens) <= self._most:
            return None
        size = self._sizes[bisect_left(self._sizes, requests)]
        recorded = self._recorded.get(size)
        fixed = recorded.batch if recorded else self._of_size(size)
        stage(batch, fixed)
        if fixed.rope_positions is not None:
            own = batch.positions.expand(3, -1) if batch.rope_positions is None else batch.rope_positions
            fixed.rope_positions[:, :requests] = own
        if recorded:
            recorded.replay()
            return recorded.result[:requests]
        result = self._forward(fixed)
        self._add(size, fixed)
        return result[:requests]

    def record_next(self) -> bool:
        """Record the largest size that is not; False when there is none."""
        size = next((s for s in reversed(self._sizes) if s not in self._recorded), None)
        if size is None:
            return False
        fixed = self._of_size(size)
        for values in (fixed.tokens, fixed.positions, fixed.starts, fixed.contexts, fixed.rows):
            values.zero_()
        if fixed.rope_positions is not None:
            fixed.rope_positions.zero_()
        fixed.cells.fill_(-1)
        try:
            self._forward(fixed)  # compiles and loads every kernel it takes
        except torch.OutOfMemoryError:
            self._without(size)
        else:
            self._add(size, fixed)
        return True

    def _add(self, size: int, fixed: Batch) -> None:
        try:
            replay, result = self._record(lambda: self._forward(fixed))
        except torch.OutOfMemoryError:
            self._without(size)
            return
        self._recorded[size] = Recorded(fixed, replay, result)

    def _without(self, size: int) -> None:
        self._sizes = tuple(s for s in self._sizes if s < size)
        _log.warning("no memory for a CUDA graph of %d requests: steps of so many run without", size)

    @property
    def _most(self) -> int:
        return self._sizes[-1] if self._sizes else 0

    def _of_size(self, size: int) -> Batch:
        """The first `size` requests of the fixed buffers."""
        f = self._fixed
        parts = {
            name: getattr(f, name)[:size] for name in ("tokens", "positions", "cells", "contexts", "rows", "slots")
        }
        if f.rope_positions is not None:
            parts["rope_positions"] = f.rope_positions[:, :size]
        return replace(f, starts=f.starts[: size + 1], block_tables=f.block_tables[:size], **parts)


def padding(requests: int, context: int, device: torch.device, *, three: bool) -> Batch:
    """A batch of nothing, as large as any decode step."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Batch(
        tokens=zeros(requests),
        positions=zeros(requests),
        cells=zeros(requests, dtype=torch.int64) - 1,
        starts=zeros(requests + 1),
        contexts=zeros(requests),
        block_tables=zeros(requests, -(-context // BLOCK_SIZE)),
        slots=zeros(requests),
        rows=zeros(requests),
        max_query=1,
        whole=True,
        max_context=context,
        rope_positions=zeros(3, requests) if three else None,
    )
