"""A step cut in two where it does not fit whole: the same tokens, one half after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pagoda.types import Int32, PlannedImage, StepPlan, StepResult

_PER_REQUEST = (
    "slots", "temperature", "top_k", "top_p", "min_p", "presence", "frequency", "repetition", "seed",
)  # fmt: skip
Places = npt.NDArray[np.intp]


def middle(plan: StepPlan, *, whole_requests: bool) -> int:
    """How many tokens of a plan the first half has; 0: it cannot be cut."""
    if whole_requests:
        return int(plan.starts[len(plan.slots) // 2])
    cut = len(plan.tokens) // 2
    inside = () if plan.last_seen is None else [i for i in plan.images if i.row < cut < i.row + i.count]
    for image in inside:  # its tokens see each other
        cut = image.row or image.row + image.count
    return cut if cut < len(plan.tokens) else 0


def part(plan: StepPlan, first: int, last: int) -> tuple[StepPlan, Places]:
    """Tokens first:last of a plan as a plan of its own, and which rows of logits it has.

    Parts that run in order see the cache as the whole does: what a token reads was written before it or with it.
    """
    begin = int(np.searchsorted(plan.starts, first, side="right")) - 1
    end = int(np.searchsorted(plan.starts, last, side="left"))
    own = slice(begin, end)
    starts = np.clip(plan.starts[begin : end + 1], first, last)
    rows = np.flatnonzero((plan.rows >= first) & (plan.rows < last))
    history = slice(plan.history_start[begin], plan.history_start[end])
    bias = slice(plan.bias_start[begin], plan.bias_start[end])
    smaller = replace(
        plan,
        **{name: getattr(plan, name)[own] for name in _PER_REQUEST},
        starts=_ints(starts - first),
        positions=_ints(plan.positions[own] + starts[:-1] - plan.starts[own]),
        tokens=plan.tokens[first:last],
        rows=_ints(plan.rows[rows] - first),
        row_request=_ints(plan.row_request[rows] - begin),
        row_target=plan.row_target[rows],
        row_top=plan.row_top[rows],
        row_mask=plan.row_mask[rows],
        history_start=_ints(plan.history_start[begin : end + 1] - history.start),
        history_ids=plan.history_ids[history],
        history_counts=plan.history_counts[history],
        bias_start=_ints(plan.bias_start[begin : end + 1] - bias.start),
        bias_ids=plan.bias_ids[bias],
        bias_values=plan.bias_values[bias],
        second_texts=None if plan.second_texts is None else plan.second_texts[own],
        rope_positions=None if plan.rope_positions is None else plan.rope_positions[:, first:last],
        adapters=None if plan.adapters is None else plan.adapters[own],
        last_seen=None if plan.last_seen is None else plan.last_seen[first:last],
        images=tuple(_images(plan, first, last)),
    )
    return smaller, rows


def _images(plan: StepPlan, first: int, last: int) -> Iterator[PlannedImage]:
    """What tokens first:last have of each image."""
    for image in plan.images:
        begin, end = max(image.row, first), min(image.row + image.count, last)
        if begin < end:
            yield replace(image, row=begin - first, first=image.first + begin - image.row, count=end - begin)


def joined(plan: StepPlan, results: Sequence[tuple[StepResult, Places]]) -> StepResult:
    """The result of a plan from those of its parts."""
    whole = empty_result(plan)
    for result, rows in results:
        width = result.top_ids.shape[1]
        whole.tokens[rows], whole.logprobs[rows], whole.ok[rows] = result.tokens, result.logprobs, result.ok
        whole.top_ids[rows, :width], whole.top_logprobs[rows, :width] = result.top_ids, result.top_logprobs
    hidden = [(result.hidden, rows) for result, rows in results if result.hidden is not None and len(rows)]
    if not hidden:
        return whole
    states = np.concatenate([values for values, _ in hidden])
    return replace(whole, hidden=states[np.argsort(np.concatenate([rows for _, rows in hidden]))])


def empty_result(plan: StepPlan) -> StepResult:
    count, width = len(plan.rows), max(0, int(plan.row_top.max(initial=0)))
    return StepResult(
        tokens=plan.row_target.astype(np.int32),
        logprobs=np.zeros(count, np.float32),
        top_ids=np.full((count, width), -1, np.int32),
        top_logprobs=np.zeros((count, width), np.float32),
        ok=np.zeros(count, np.uint8),
    )


def _ints(values: npt.NDArray[np.integer]) -> Int32:
    return np.ascontiguousarray(values, dtype=np.int32)
