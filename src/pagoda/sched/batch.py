"""Turns the turns of one step into the flat arrays of a StepPlan; keeps what does not change in rows per slot."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from pagoda.sched.state import Mask, Sequence, Turn, mask_words
from pagoda.types import BLOCK_SIZE, Int32, PlannedImage, StepPlan

_UINT64 = 2**64 - 1
_NOWHERE = 2**31 - 1


class Batch:
    """Persistent arrays, one row per slot: block tables and the parameters that a request never changes."""

    def __init__(self, max_num_seqs: int, max_model_len: int, vocab_size: int) -> None:
        self.block_tables: Int32 = np.zeros((max_num_seqs, -(-max_model_len // BLOCK_SIZE)), np.int32)
        self._floats = np.zeros((6, max_num_seqs), np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._mask_words = mask_words(vocab_size)
        self._steady: StepPlan | None = None  # the last plan, if the same streams may go on with most of its arrays
        self._steady_seqs: list[tuple[Sequence, int]] = []

    def seat(self, seq: Sequence) -> None:
        """Write a request's parameters into the row of its slot."""
        p = seq.params
        self._floats[:, seq.slot] = (
            p.temperature,
            p.top_p,
            p.min_p,
            p.presence_penalty,
            p.frequency_penalty,
            p.repetition_penalty,
        )
        self._top_k[seq.slot] = max(p.top_k, 0)
        self._seed[seq.slot] = (p.seed or 0) & _UINT64

    def add_blocks(self, seq: Sequence, blocks: list[int]) -> None:
        held = len(seq.blocks)
        self.block_tables[seq.slot, held : held + len(blocks)] = blocks
        seq.blocks += blocks

    def plan(self, step: int, turns: list[Turn], alone: bool) -> StepPlan:
        """`alone`: no step is in flight, so the plan before may be written anew."""
        seqs = [(turn.seq, turn.seq.slot) for turn in turns]
        steady = all(turn.steady for turn in turns)
        if steady and self._steady is not None and seqs == self._steady_seqs:
            plan = self._steady
            tokens, positions = [seq.known[-1] for seq, _ in seqs], [seq.computed for seq, _ in seqs]
            if alone and plan.rope_positions is None and not plan.images:
                plan.step, plan.tokens[:], plan.positions[:] = step, tokens, positions
                return plan
            rope = _rope_positions(turns)
            changed: dict[str, Any] = {"rope_positions": rope, "last_seen": None, "images": ()}
            plan = replace(plan, step=step, tokens=_ints(tokens), positions=_ints(positions), **changed)
        else:
            plan = self._whole_plan(step, turns)
        self._steady, self._steady_seqs = (plan, seqs) if steady else (None, [])
        return plan

    def follow(self, plan: StepPlan, step: int, tokens: Int32) -> None:
        """Write the last plan anew for the step behind it: its streams go on with these tokens."""
        plan.step, plan.tokens[:] = step, tokens
        plan.positions += 1

    def _whole_plan(self, step: int, turns: list[Turn]) -> StepPlan:
        tokens: list[int] = []
        rows: list[int] = []
        row_request: list[int] = []
        row_target: list[int] = []
        row_top: list[int] = []
        for r, turn in enumerate(turns):
            seq, first = turn.seq, turn.seq.computed
            base = len(tokens) - first
            tokens += seq.known[first : first + turn.count]
            if turn.scoring:
                rows += (base + place - 1 for place in turn.scoring)
                row_request += [r] * len(turn.scoring)
                row_target += (seq.known[place] for place in turn.scoring)
                row_top += [seq.params.prompt_logprobs or 0] * len(turn.scoring)
            if turn.samples:
                sampled, named, last = turn.sampled_rows, turn.named, len(tokens) - 1
                rows += [*range(last, last + sampled), *[last] * len(named)]
                row_request += [r] * (sampled + len(named))
                row_target += [*[-1] * sampled, *named]
                row_top += [seq.told_top] * sampled + [0] * len(named)
                tokens += turn.drafts
            if turn.pooled:
                rows += (base + place for place in turn.pooled)
                row_request += [r] * len(turn.pooled)
                row_target += [-1] * len(turn.pooled)
                row_top += [-1] * len(turn.pooled)
        seqs = [turn.seq for turn in turns]
        slots = _ints([seq.slot for seq in seqs])
        floats = self._floats.take(slots, axis=1)
        return StepPlan(
            step=step,
            slots=slots,
            starts=_ints([0, *accumulate([turn.count + len(turn.drafts) for turn in turns])]),
            positions=_ints([seq.computed for seq in seqs]),
            tokens=_ints(tokens),
            block_tables=self.block_tables,
            rows=_ints(rows),
            row_request=_ints(row_request),
            row_target=_ints(row_target),
            row_top=_ints(row_top),
            temperature=floats[0],
            top_k=self._top_k[slots],
            top_p=floats[1],
            min_p=floats[2],
            presence=floats[3],
            frequency=floats[4],
            repetition=floats[5],
            seed=self._seed[slots],
            second_texts=_second_texts(seqs),
            rope_positions=_rope_positions(turns),
            last_seen=_last_seen(turns),
            images=_images(turns),
            adapters=_adapters(seqs),
            kept=_kept(turns),
            **_history(seqs),
            **_bias(seqs),
            **self._masks(turns),
        )

    def _masks(self, turns: list[Turn]) -> dict[str, Any]:
        """A grammar is asked only where a token is sampled: its answer may take longer than all else here."""
        rows: list[int] = []
        masks: list[Mask] = []
        for turn in turns:
            own = turn.seq.masks(turn.drafts) if turn.samples else []
            rows += [-1] * len(turn.scoring)
            rows += range(len(masks), len(masks) + len(own)) if own else [-1] * turn.sampled_rows
            rows += [-1] * (len(turn.named) + len(turn.pooled))
            masks += own
        return {"row_mask": _ints(rows), "masks": np.array(masks, np.uint32).reshape(len(masks), self._mask_words)}


def _rope_positions(turns: list[Turn]) -> Int32 | None:
    if all(turn.seq.sight is None or turn.seq.sight.in_line for turn in turns):
        return None
    found = []
    for turn in turns:
        first, count, sight = turn.seq.computed, turn.count + len(turn.drafts), turn.seq.sight
        plain = np.broadcast_to(np.arange(first, first + count, dtype=np.int32), (3, count))
        found.append(plain if sight is None else sight.positions(first, count))
    # as executors read them: numpy alone would lie them the other way round where text is beside pictures
    return np.ascontiguousarray(np.concatenate(found, axis=1))


def _last_seen(turns: list[Turn]) -> Int32 | None:
    """None where no token of the step sees one behind it."""
    if not any(turn.seq.sight is not None and turn.seq.sight.looks_ahead(turn.seq.computed) for turn in turns):
        return None
    found = []
    for turn in turns:
        first, count, sight = turn.seq.computed, turn.count + len(turn.drafts), turn.seq.sight
        plain = np.arange(first, first + count, dtype=np.int32)
        found.append(plain if sight is None else sight.last_seen(first, count))
    return np.concatenate(found)


def _images(turns: list[Turn]) -> tuple[PlannedImage, ...]:
    found: list[PlannedImage] = []
    row = 0
    for turn in turns:
        if turn.seq.sight is not None:
            found += turn.seq.sight.planned(turn.seq.computed, turn.count, row)
        row += turn.count + len(turn.drafts)
    return tuple(found)


def _adapters(seqs: list[Sequence]) -> Int32 | None:
    places = [seq.place for seq in seqs]
    return None if max(places, default=-1) < 0 else _ints(places)


def _kept(turns: list[Turn]) -> Int32 | None:
    if all(turn.kept is None for turn in turns):
        return None
    return np.array([turn.kept or (-1, -1, -1) for turn in turns], np.int32)


def _second_texts(seqs: list[Sequence]) -> Int32 | None:
    places = [seq.request.second_text for seq in seqs]
    if all(place is None for place in places):
        return None
    return _ints([_NOWHERE if place is None else place for place in places])


def _ints(values: list[int]) -> Int32:
    return np.array(values, np.int32)


def _history(seqs: list[Sequence]) -> dict[str, Any]:
    parts = [None if seq.history is None else seq.history.arrays() for seq in seqs]
    start, ids, counts = _ragged(parts, np.int32)
    return {"history_start": start, "history_ids": ids, "history_counts": counts}


def _bias(seqs: list[Sequence]) -> dict[str, Any]:
    start, ids, values = _ragged([seq.bias for seq in seqs], np.float32)
    return {"bias_start": start, "bias_ids": ids, "bias_values": values}


def _ragged(
    parts: Seq[tuple[Int32, npt.NDArray[Any]] | None], dtype: type[np.generic]
) -> tuple[Int32, Int32, npt.NDArray[Any]]:
    """Start offsets per request, then the ids and values of those that have any, one after the other."""
    used = [part for part in parts if part is not None]
    if not used:
        return np.zeros(len(parts) + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, dtype)
    start = _ints([0, *accumulate(0 if part is None else len(part[0]) for part in parts)])
    return start, np.concatenate([part[0] for part in used]), np.concatenate([part[1] for part in used])
