"""A step's arrays on the device: everything of a StepPlan in one copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagoda.backend.rows import adapter_rows
from pagoda.backend.torch.batch import Ahead, Batch, OnHost
from pagoda.backend.torch.sampling import NEAREST, Ragged, Sampling
from pagoda.types import BLOCK_SIZE, Int32, StepPlan

MAX_ROWS = 256
"""Rows of logits that are computed at a time; more (log-probabilities of prompts) are taken in turns."""

_ALIGN_BYTES = 16
_FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows first:last of a plan's logits. `targets` int64: given tokens, or -1."""

    first: int
    last: int
    targets: Tensor
    sampling: Sampling


class Fed(NamedTuple):
    """Of a StepPlan, what a forward pass takes."""

    slots: Int32
    starts: Int32
    positions: Int32
    tokens: Int32
    block_tables: Int32
    rows: Int32
    rope_positions: Int32 | None = None
    last_seen: Int32 | None = None
    kept: Int32 | None = None


class Parcel:
    """Collects arrays, sends them in one copy, gives them out as tensors by name."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._tensors: dict[str, Tensor] = {}

    def add(self, prefix: str = "", **arrays: npt.NDArray[Any]) -> None:
        self._arrays |= {prefix + name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def send(self, device: torch.device) -> None:
        sizes = [-(-array.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES for array in self._arrays.values()]
        host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        begins = np.cumsum([0, *sizes])[:-1].tolist()
        raw = host.numpy()
        for begin, array in zip(begins, self._arrays.values(), strict=True):
            raw[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
        sent = host.to(device, non_blocking=True)
        for begin, (name, array) in zip(begins, self._arrays.items(), strict=True):
            kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
            self._tensors[name] = sent[begin : begin + array.nbytes].view(kind).reshape(array.shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def upload(plan: StepPlan, device: torch.device, num_blocks: int) -> tuple[Batch, list[Rows]]:
    """The batch of a plan, and its rows of logits in turns. IndexError for a block that the cache does not have."""
    parcel = Parcel()
    batch = _add_batch(parcel, plan, num_blocks)
    turns = [(first, min(first + MAX_ROWS, len(plan.rows))) for first in range(0, len(plan.rows), MAX_ROWS)]
    for first, last in turns:
        _add_rows(parcel, plan, first, last)
    parcel.send(device)
    return batch(), [_rows(parcel, plan, first, last) for first, last in turns]


def upload_batch(fed: Fed, device: torch.device, num_blocks: int) -> Batch:
    """The batch alone, for a process that samples nothing."""
    parcel = Parcel()
    batch = _add_batch(parcel, fed, num_blocks)
    parcel.send(device)
    return batch()


def _add_batch(parcel: Parcel, plan: StepPlan | Fed, num_blocks: int) -> Callable[[], Batch]:
    """What gives the batch once the parcel is sent."""
    lengths = np.diff(plan.starts)
    contexts = plan.positions + lengths
    max_context = int(contexts.max(initial=0))
    tables = plan.block_tables[plan.slots, : -(-max_context // BLOCK_SIZE)]
    request_of = np.repeat(np.arange(len(plan.slots)), lengths)
    positions = np.arange(len(plan.tokens)) - plan.starts[request_of] + plan.positions[request_of]
    cells = tables[request_of, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    if len(cells) and not 0 <= int(cells.min()) <= int(cells.max()) < num_blocks * BLOCK_SIZE:
        raise IndexError("the plan names a block outside the cache")
    parcel.add(cells=cells, tokens=plan.tokens, positions=positions.astype(np.int32), starts=plan.starts)
    parcel.add(contexts=contexts, tables=tables, rows=plan.rows, slots=plan.slots)
    if plan.rope_positions is not None:
        parcel.add(rope_positions=plan.rope_positions)
    if plan.kept is not None:
        parcel.add(kept=plan.kept)
    second = plan.second_texts if isinstance(plan, StepPlan) else None
    if second is not None:
        parcel.add(types=(positions >= second[request_of]).astype(np.int32))
    adapted = adapter_rows(plan) if isinstance(plan, StepPlan) else []
    parcel.add("adapter.", **{str(place): own.astype(np.int64) for place, own in adapted})
    return lambda: Batch(
        tokens=parcel["tokens"],
        positions=parcel["positions"],
        cells=parcel["cells"],
        starts=parcel["starts"],
        contexts=parcel["contexts"],
        block_tables=parcel["tables"],
        slots=parcel["slots"],
        rows=parcel["rows"],
        max_query=int(lengths.max(initial=0)),
        whole=np.array_equal(plan.rows, np.arange(len(plan.tokens))),
        decoding=decoding(plan),
        max_context=max_context,
        types=None if second is None else parcel["types"],
        rope_positions=None if plan.rope_positions is None else parcel["rope_positions"],
        adapters=tuple((place, parcel[f"adapter.{place}"]) for place, _ in adapted),
        ahead=_ahead(plan.last_seen, positions, request_of),
        kept=None if plan.kept is None else parcel["kept"],
        on_host=OnHost(plan.starts, contexts, tables),
    )


def decoding(plan: StepPlan | Fed) -> bool:
    """Every request has one token, which is a word, and wants its logits; none has an adapter."""
    if isinstance(plan, StepPlan):
        words = not plan.images and not adapter_rows(plan)
    else:
        words = bool(plan.tokens.min(initial=0) >= 0)
    each = np.arange(len(plan.slots) + 1)
    return words and np.array_equal(plan.starts, each) and np.array_equal(plan.rows, each[:-1])


def _ahead(
    last_seen: Int32 | None, positions: npt.NDArray[np.intp], request_of: npt.NDArray[np.intp]
) -> tuple[Ahead, ...]:
    """Runs of tokens of one request that see up to the same one, which lies behind some of them."""
    if last_seen is None:
        return ()
    ends = np.flatnonzero(last_seen == positions) + 1  # each run ends with the token that it sees last
    begins = np.concatenate([[0], ends[:-1]])
    runs = [(int(a), int(b)) for a, b in zip(begins, ends, strict=True) if b - a > 1]
    return tuple(Ahead(a, b, int(request_of[a]), int(positions[a])) for a, b in runs)


def _add_rows(parcel: Parcel, plan: StepPlan, first: int, last: int) -> None:
    prefix, request = f"{first}.", plan.row_request[first:last]
    parcel.add(prefix, **{name: getattr(plan, name)[request] for name in _FLOATS})
    position = plan.positions[request] + plan.rows[first:last] - plan.starts[request] + 1
    parcel.add(prefix, position=position.astype(np.int64), seed=plan.seed[request].view(np.int64))
    parcel.add(prefix, top_k=plan.top_k[request].astype(np.int64), targets=plan.row_target[first:last].astype(np.int64))
    _add_ragged(parcel, f"{prefix}history.", plan.history_start, plan.history_ids, plan.history_counts, request)
    _add_ragged(parcel, f"{prefix}bias.", plan.bias_start, plan.bias_ids, plan.bias_values, request)
    masked = np.flatnonzero(plan.row_mask[first:last] >= 0)
    words = plan.masks[plan.row_mask[first:last][masked]]
    parcel.add(prefix, mask_rows=masked.astype(np.int64), mask_words=words.view(np.int32))


def _add_ragged(
    parcel: Parcel,
    prefix: str,
    start: npt.NDArray[np.int32],
    ids: npt.NDArray[Any],
    values: npt.NDArray[Any],
    request: npt.NDArray[np.int32],
) -> None:
    """The entries start[r]:start[r + 1] of the request of each row."""
    counts = (start[1:] - start[:-1])[request]
    rows = np.repeat(np.arange(len(request)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    entries = start[request[rows]] + within
    parcel.add(prefix, rows=rows, ids=ids[entries].astype(np.int64), values=values[entries].astype(np.float32))


def _rows(parcel: Parcel, plan: StepPlan, first: int, last: int) -> Rows:
    def ragged(name: str) -> Ragged | None:
        rows, ids, values = (parcel[f"{first}.{name}.{part}"] for part in ("rows", "ids", "values"))
        return Ragged(rows, ids, values) if len(rows) else None

    def number(name: str) -> Tensor:
        return parcel[f"{first}.{name}"]

    request = plan.row_request[first:last]
    drawn = (plan.temperature[request] > 0) & (plan.row_target[first:last] < 0)
    top_k = plan.top_k[request]
    near = (top_k > 0) & (top_k <= NEAREST)
    sampling = Sampling(
        **{name: number(name) for name in (*_FLOATS, "seed", "position", "top_k")},
        history=ragged("history"),
        bias=ragged("bias"),
        mask=(number("mask_rows"), number("mask_words")) if len(number("mask_rows")) else None,
        random=bool(drawn.any()),
        near=bool((drawn & near).any()),
        sorted=bool((drawn & ~near & (top_k > 0)).any()),
        nucleus=bool((drawn & (top_k == 0) & (plan.top_p[request] < 1)).any()),
    )
    return Rows(first, last, number("targets"), sampling)
