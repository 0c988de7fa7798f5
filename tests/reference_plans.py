"""Builds step plans by hand for tests of executors and sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pagoda.types import StepPlan


@dataclass
class Feed:
    """What one request feeds in a step. `rows`: (index among its tokens, target or -1, top or -1)."""

    tokens: Sequence[int]
    position: int = 0
    blocks: Sequence[int] = (0,)
    rows: Sequence[tuple[int, int, int]] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    history: dict[int, int] = field(default_factory=dict)
    bias: Sequence[tuple[int, float]] = ()
    allowed: Iterable[int] | None = None


def make_plan(feeds: Sequence[Feed], vocab: int, slots: Sequence[int] | None = None) -> StepPlan:
    slots = list(range(len(feeds))) if slots is None else slots
    starts = _starts([len(f.tokens) for f in feeds])
    tables = np.zeros((max(slots) + 1, max(len(f.blocks) for f in feeds)), np.int32)
    for slot, f in zip(slots, feeds, strict=True):
        tables[slot, : len(f.blocks)] = f.blocks
    rows = [(starts[r] + i, r, target, top) for r, f in enumerate(feeds) for i, target, top in f.rows]
    masked = [r for r, f in enumerate(feeds) if f.allowed is not None]
    numbers = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
    by_name: dict[str, Any] = {n: np.array([getattr(f, n) for f in feeds], np.float32) for n in numbers}
    row_columns = dict(
        zip(("rows", "row_request", "row_target", "row_top"), np.array(rows).reshape(-1, 4).T, strict=True)
    )
    return StepPlan(
        step=0,
        slots=_ints(slots),
        starts=starts,
        positions=_ints([f.position for f in feeds]),
        tokens=_ints([t for f in feeds for t in f.tokens]),
        block_tables=tables,
        **{name: _ints(column) for name, column in row_columns.items()},
        **by_name,
        top_k=_ints([f.top_k for f in feeds]),
        seed=np.array([f.seed for f in feeds], np.uint64),
        history_start=_starts([len(f.history) for f in feeds]),
        history_ids=_ints([i for f in feeds for i in f.history]),
        history_counts=_ints([n for f in feeds for n in f.history.values()]),
        bias_start=_starts([len(f.bias) for f in feeds]),
        bias_ids=_ints([i for f in feeds for i, _ in f.bias]),
        bias_values=np.array([v for f in feeds for _, v in f.bias], np.float32),
        row_mask=_ints([masked.index(r) if r in masked else -1 for _, r, _, _ in rows]),
        masks=np.array([_mask(feeds[r].allowed or (), vocab) for r in masked], np.uint32).reshape(-1, -(-vocab // 32)),
    )


def _ints(values: Any) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(values, dtype=np.int32)


def _starts(lengths: Sequence[int]) -> npt.NDArray[np.int32]:
    return _ints(np.cumsum([0, *lengths]))


def _mask(allowed: Iterable[int], vocab: int) -> list[int]:
    words = [0] * -(-vocab // 32)
    for token in allowed:
        words[token // 32] |= 1 << token % 32
    return words
