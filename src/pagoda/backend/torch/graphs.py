"""CUDA graphs of decode steps: a step of single tokens is replayed as one launch, in a batch padded to a few sizes.

Sizes are recorded while nothing is asked, the largest first, so that the others fit into its memory; one that a step
needs before is recorded behind that step, which runs as it is in the padded batch. So no start waits for graphs.

Where several GPUs share a model, all record a size at the same time and agree on what came of it: an exchange is part
of a graph on all of them or on none, which is what NCCL asks.
"""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.kernels.stage import stage
from pagoda.backend.torch.team import ALONE, Team
from pagoda.types import BLOCK_SIZE

_log = logging.getLogger(__name__)

Forward = Callable[[Batch], Tensor]
Replay = Callable[[], object]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records what a call does; gives a way to do it again, and the tensor that then holds its result."""
_FAILED, _NO_MEMORY, _DONE = range(3)
_T = TypeVar("_T")


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
        graph, stream, collects = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), gc.isenabled()
        # a collection in the middle would free tensors of others, which a recording forbids
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            torch.cuda.set_stream(stream)  # one that fails may stay on its own
            raise
        finally:
            if collects:
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
        recurrent: bool = False,
        team: Team = ALONE,
    ) -> None:
        """`three`: tokens turn by three positions. `recurrent`: requests have a state."""
        self._forward, self._record, self._team = forward, record, team
        self._sizes = sizes(most_requests)
        self._recorded: dict[int, Recorded] = {}
        self._without: set[int] = set()
        """Sizes that could not be recorded. They are padded all the same: several GPUs have to agree on the rows."""
        self._fixed = padding(most_requests, most_context, device, three=three, recurrent=recurrent)
        self.wanted: int | None = None
        """The size of the last batch, where a graph of it is still to be recorded."""

    def run(self, batch: Batch) -> Tensor | None:
        """The forward pass of a batch, [L, hidden], good until the next one; None where no graph is for it."""
        requests, self.wanted = len(batch.tokens), None
        if not batch.decoding or requests > self._sizes[-1]:
            return None
        size = self.padded(requests)
        recorded = self._recorded.get(size)
        fixed = recorded.batch if recorded else self._of_size(size)
        stage(batch, fixed)
        if fixed.rope_positions is not None:
            own = batch.positions.expand(3, -1) if batch.rope_positions is None else batch.rope_positions
            fixed.rope_positions[:, :requests] = own
        if fixed.kept is not None:
            kept = fixed.kept[:requests]
            kept.fill_(-1) if batch.kept is None else kept.copy_(batch.kept)
        if recorded:
            return self._replayed(recorded)[:requests]
        self.wanted = None if size in self._without else size
        return self._forward(fixed)[:requests]

    def padded(self, requests: int) -> int:
        """The size that so many requests are padded to."""
        return self._sizes[bisect_left(self._sizes, requests)] if requests <= self._sizes[-1] else requests

    def idle(self, requests: int) -> Callable[[], object] | None:
        """What replays the graph of so many requests with none, in no memory; None where there is no graph."""
        recorded = self._recorded.get(self.padded(requests))
        if recorded is None:
            return None

        def replay() -> None:
            emptied(recorded.batch)
            self._replayed(recorded)

        return replay

    def next_size(self) -> int | None:
        """The largest that is not recorded; None when there is none."""
        done = self._recorded.keys() | self._without
        return next((size for size in reversed(self._sizes) if size not in done), None)

    def record(self, size: int, *, new: bool) -> None:
        """Behind a step of that size; or `new`: behind none, so that kernels may have to be compiled and loaded."""
        fixed, self.wanted = self._of_size(size), None

        def compiled() -> bool:
            stage(fixed, fixed)
            self._team.tried(size, lambda: self._forward(emptied(fixed)))
            return True

        if new and not self._agreed(size, compiled):
            return
        if found := self._agreed(size, lambda: self._record(lambda: self._forward(fixed))):
            self._recorded[size] = Recorded(fixed, *found)

    def _replayed(self, recorded: Recorded) -> Tensor:
        recorded.replay()
        self._team.replayed()
        return recorded.result

    def _agreed(self, size: int, work: Callable[[], _T]) -> _T | None:
        """What came of a part of a recording, if it went well on all GPUs that share the model."""
        made: list[_T] = []

        def tried() -> int:
            try:
                made.append(work())
            except torch.OutOfMemoryError:
                _log.warning("no memory for a CUDA graph of %d requests: steps of so many run without", size)
                return _NO_MEMORY
            except Exception:  # graphs only save time: where one cannot be recorded, none is tried again
                _log.exception("a CUDA graph of %d requests was not recorded: steps run without, and take longer", size)
                return _FAILED
            return _DONE

        found = self._team.least(tried)
        if found == _DONE:
            return made[0]
        self._without.update((size,) if found == _NO_MEMORY else self._sizes)
        if made:
            _log.warning("a CUDA graph of %d requests was not recorded on another GPU: nor is it here", size)
        return None

    def _of_size(self, size: int) -> Batch:
        """The first `size` requests of the fixed buffers."""
        f = self._fixed
        parts = {
            name: getattr(f, name)[:size] for name in ("tokens", "positions", "cells", "contexts", "rows", "slots")
        }
        if f.kept is not None:
            parts["kept"] = f.kept[:size]
        if f.rope_positions is not None:
            parts["rope_positions"] = f.rope_positions[:, :size]
        return replace(f, starts=f.starts[: size + 1], block_tables=f.block_tables[:size], **parts)


def emptied(batch: Batch) -> Batch:
    """The batch as padding alone."""
    for values in (batch.tokens, batch.positions, batch.starts, batch.contexts, batch.rows):
        values.zero_()
    if batch.rope_positions is not None:
        batch.rope_positions.zero_()
    batch.cells.fill_(-1)
    return batch


def padding(requests: int, context: int, device: torch.device, *, three: bool, recurrent: bool = False) -> Batch:
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
        kept=zeros(requests, 3) - 1 if recurrent else None,
    )
