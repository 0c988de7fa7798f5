"""The processes that share a model (ranks), as each of them sees the others: sums, logits, steps to follow."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import Store

from pagoda.arch.memory import blocks_for
from pagoda.arch.sharding import share, vocab_range
from pagoda.arch.spec import ModelSpec
from pagoda.backend.torch.batch import Seen
from pagoda.backend.torch.faults import engine_lost
from pagoda.backend.torch.model import Block, Decoder, Table, with_seen
from pagoda.backend.torch.team import Team
from pagoda.backend.torch.upload import MAX_ROWS, Fed
from pagoda.errors import ConfigError, EngineError, MemoryShort, ModelError, PagodaError
from pagoda.types import Int32, StepPlan
from pagoda.weights.source import Tensor as Stored

_FOREVER = timedelta(days=365)  # a rank waits for the next step as long as nobody asks; deaths are seen elsewhere
_REPORT_BYTES = 4096
_HEAD = 1024
"""Numbers of a step that go in the first message: all of most decode steps."""
_ERRORS = MappingProxyType({kind.__name__: kind for kind in (ConfigError, MemoryShort, ModelError)})

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Summed:
    """A block of a layer of which each rank computes a part of the sum."""

    own: Block
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.sum(self.own(x))


@dataclass(frozen=True, slots=True)
class SplitEmbedding:
    """Rows `first` to `last` of the table are here, those of other tokens at other ranks."""

    own: Table
    first: int
    last: int
    group: Group

    def __call__(self, tokens: Tensor, seen: Seen) -> Tensor:
        """Tokens below 0 are nobody's: rank 0 has the vectors of images for them, and gives them to all in the sum."""
        there = (tokens < self.first) | (tokens >= self.last)
        rows = self.own.rows((tokens - self.first).clamp(0, self.last - self.first - 1))
        rows = rows.masked_fill(there.unsqueeze(-1), 0)
        if self.group.wide > 1:
            rows = F.pad(rows, (0, (self.group.wide - 1) * rows.shape[1]))
        return self.group.sum(with_seen(rows, seen))


@dataclass(frozen=True, slots=True)
class SplitHead:
    """Logits of the tokens of each rank; rank 0 gets all of them, the others keep their own."""

    own: Block
    width: int  # of the first rank, the largest
    vocab_size: int
    group: Group

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.own(hidden)
        parts = self.group.gathered(F.pad(logits, (0, self.width - logits.shape[-1])))
        return torch.cat(parts, dim=-1)[:, : self.vocab_size].contiguous() if parts else logits


@dataclass(frozen=True, slots=True)
class Work(Generic[_T]):
    """A forward pass of `width` tokens, and `rows` of logits. `idle` takes part in the exchanges of the forward pass in
    place of it, where all ranks do them in a graph."""

    width: int
    rows: int
    run: Callable[[], _T]
    idle: Callable[[], object] | None = None


class Recording(NamedTuple):
    """What all ranks record at the same time; see DecodeGraphs.record."""

    size: int
    new: bool


class Group(Team):
    """Everything that one rank sends to the others or hears of them. Each call is made by all ranks."""

    def __init__(self, rank: int, size: int, meeting: str | Store, cuda: bool) -> None:
        """`meeting` is where the ranks find each other: the URL of a file, or a store that all have open."""
        if dist.is_initialized():
            raise ConfigError("this process has a model on several GPUs already", remedy="Close it first")
        self.rank, self.size, self.count = rank, size, f"{size} x "
        # with buffers of graphs registered, ranks wait for each other while they record: also for one that has failed
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        # numbers of steps go by gloo, which waits without computing
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        place = {"init_method": meeting} if isinstance(meeting, str) else {"store": meeting}
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=_FOREVER, **place)
        self._sums = self._gathers = 0  # done in this step
        self.vectors = 1  # of a token that stands for a part of an image
        self.wide = 1  # vectors of each token in this step
        self._spare, self._widths, self._sums_of_step = torch.empty(0), (0, 0), 0

    def close(self) -> None:
        dist.destroy_process_group()

    def share(self, spec: ModelSpec, tensors: dict[str, Stored]) -> tuple[ModelSpec, dict[str, Stored]]:
        self.vectors = 1 if spec.vision is None else spec.vision.vectors
        return share(spec, tensors, self.rank, self.size)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks. Among CPUs in their order: gloo's own depends on the place within the tensor."""
        if x.is_cuda:
            dist.all_reduce(x)
            self._sums += 1
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        self._sums += 1
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def gathered(self, x: Tensor) -> list[Tensor]:
        """What each rank has, at rank 0; nothing at the others."""
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self._gather(x.contiguous(), parts)
        return parts

    def _gather(self, x: Tensor, parts: list[Tensor]) -> None:
        dist.gather(x, parts or None, dst=0)
        self._gathers += 1

    def replayed(self) -> None:
        """A graph counts no sums."""
        self._sums = self._sums_of_step

    def tried(self, tokens: int, work: Callable[[], object]) -> None:
        try:
            self.step(np.zeros(tokens, np.int32), Work(tokens, 0, work))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the others wait within the step
            raise engine_lost(f"rank {self.rank} failed in a trial step") from error

    def step(self, tokens: Int32, work: Work[_T]) -> _T:
        """What comes of a step's work at this rank.

        OutOfMemoryError at each rank that had too little, and at rank 0 where any had: its result is of no use then,
        and all are ready for another step.
        """
        self._sums = self._gathers = 0
        self.wide = self.vectors if (tokens < 0).any() else 1
        found: list[_T] = []
        with suppress(torch.OutOfMemoryError):
            found.append(work.run())
        if not found:  # what the work held is free now
            self._attend(work)
        short = torch.tensor(int(not found))
        dist.reduce(short, 0, dist.ReduceOp.MAX)  # by gloo: while the device computes
        if not found or (self.rank == 0 and int(short)):
            raise torch.OutOfMemoryError(f"a step of {len(tokens)} tokens does not fit at one of {self.size} ranks")
        return found[0]

    def _attend(self, work: Work[_T]) -> None:
        """Take part in what is left of a step, without memory of its own: the others would wait for this rank."""
        hidden, width = self._widths
        if self._sums < self._sums_of_step and work.idle is not None:
            work.idle()
        while self._sums < self._sums_of_step:
            wide = hidden * (1 if self._sums else self.wide)
            self.sum(self._spare[: work.width * wide].zero_().view(work.width, wide))
        while (first := self._gathers * MAX_ROWS) < work.rows:
            count = min(MAX_ROWS, work.rows - first)
            own = self._spare[: count * width].zero_().view(count, width)
            self._gather(own, [own] * self.size if self.rank == 0 else [])

    def least(self, work: Callable[[], int]) -> int:
        number = torch.tensor([self._agreed(work)])
        dist.all_reduce(number, dist.ReduceOp.MIN)
        return int(number)

    def joined(self, load: Callable[[], Decoder], most_tokens: int) -> Decoder:
        decoder = self._agreed(lambda: self._with_spare(load(), most_tokens))
        spec = decoder.spec
        layers = [
            replace(layer, o=Summed(layer.o, self), mlp=None if layer.mlp is None else Summed(layer.mlp, self))
            for layer in decoder.layers
        ]
        decoder.layers = tuple(layers)
        if isinstance(decoder.embed, Table):
            decoder.embed = SplitEmbedding(decoder.embed, *vocab_range(spec, self.rank, self.size), self)
        decoder.head = SplitHead(decoder.head, vocab_range(spec, 0, self.size)[1], spec.vocab_size, self)
        return decoder

    def _with_spare(self, decoder: Decoder, most_tokens: int) -> Decoder:
        """Set aside what a rank without memory sends to the others."""
        spec = decoder.spec
        width, rows = vocab_range(spec, 0, self.size)[1], MAX_ROWS if spec.pooling is None else 0
        one = decoder.embed(torch.zeros(1, dtype=torch.int64, device=decoder.cos_sin[0].device), ())
        self._spare = one.new_empty(max(most_tokens * spec.hidden_size * self.vectors, rows * width))
        self._widths, self._sums_of_step = (
            (spec.hidden_size, width),
            1 + sum(1 + bool(layer.mlp.size) for layer in spec.layers),
        )
        return decoder

    def _agreed(self, work: Callable[[], _T]) -> _T:
        """What came of the work, once no rank failed at it. The first failure is raised by all."""
        found: list[_T] = []
        said: tuple[str, ...] = ()
        try:
            found.append(work())
        except PagodaError as error:
            said = (type(error).__name__, error.message, error.remedy)
        except Exception as error:
            _log.exception("rank %d failed", self.rank)
            said = ("EngineError", f"rank {self.rank} of {self.size} failed: {type(error).__name__}", "")
        for kind, message, remedy in filter(None, self._reports(said)):
            raise _ERRORS.get(kind, EngineError)(message, remedy=remedy)
        return found[0]

    def _reports(self, said: tuple[str, ...]) -> list[list[str]]:
        text = json.dumps([part[:500] for part in said]).encode()
        own = np.frombuffer(text.ljust(_REPORT_BYTES)[:_REPORT_BYTES], np.uint8).copy()
        parts = [torch.empty(_REPORT_BYTES, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, torch.from_numpy(own))
        return [json.loads(part.numpy().tobytes()) for part in parts]

    def tell(self, what: StepPlan | Recording | None) -> None:
        """From rank 0: the step that all compute now, the graph that all record; None: there is nothing any more."""
        head, numbers = np.zeros(_HEAD, np.int32), np.zeros(0, np.int32)
        if isinstance(what, Recording):
            head[:2] = -what.size, what.new
        elif what is not None:
            numbers = _packed(what)
            head[0] = len(numbers)
            first = numbers[: _HEAD - 1]
            head[1 : 1 + len(first)] = first
        dist.broadcast(torch.from_numpy(head), src=0)
        if len(numbers) >= _HEAD:
            dist.broadcast(torch.from_numpy(numbers[_HEAD - 1 :].copy()), src=0)

    def told(self) -> Fed | Recording | None:
        """What rank 0 tells; waits for it."""
        head = torch.empty(_HEAD, dtype=torch.int32)
        dist.broadcast(head, src=0)
        count = int(head[0])
        if count < 0:
            return Recording(-count, bool(head[1]))
        rest = torch.empty(max(0, count - _HEAD + 1), dtype=torch.int32)
        if len(rest):
            dist.broadcast(rest, src=0)
        return _unpacked(torch.cat((head[1:], rest)).numpy()[:count]) if count else None


def _packed(plan: StepPlan) -> Int32:
    """What a forward pass takes, in one array: seven sizes, then the arrays of Fed."""
    last = plan.positions + np.diff(plan.starts)
    width = blocks_for(int(last.max(initial=0)))
    tables = plan.block_tables[plan.slots, :width]
    turned = np.zeros(0, np.int32) if plan.rope_positions is None else plan.rope_positions.reshape(-1)
    ahead = np.zeros(0, np.int32) if plan.last_seen is None else plan.last_seen
    kept = np.zeros(0, np.int32) if plan.kept is None else plan.kept.reshape(-1)
    sizes = [len(plan.slots), len(plan.tokens), len(plan.rows), width, len(turned), len(ahead), len(kept)]
    arrays = (plan.slots, plan.starts, plan.positions, plan.tokens, tables.reshape(-1), plan.rows, turned, ahead, kept)
    return np.concatenate([np.array(sizes, np.int32), *arrays])


def _unpacked(numbers: Int32) -> Fed:
    requests, tokens, rows, width, turns, seen, copied = numbers[:7].tolist()
    lengths = (requests, requests + 1, requests, tokens, requests * width, rows, turns, seen)
    slots, starts, positions, ids, own, wanted, turned, ahead, kept = np.split(numbers[7:], np.cumsum(lengths))
    tables = np.zeros((int(slots.max(initial=-1)) + 1, width), np.int32)
    tables[slots] = own.reshape(requests, width)
    three = turned.reshape(3, tokens) if turns else None
    states = kept.reshape(requests, 3) if copied else None
    return Fed(slots, starts, positions, ids, tables, wanted, three, ahead if seen else None, states)
