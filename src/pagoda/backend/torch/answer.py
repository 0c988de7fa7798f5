"""From rows of logits to a StepResult: chosen on the device, fetched when asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pagoda.backend.torch import ops, sampling
from pagoda.backend.torch.kernels.draw import drawn
from pagoda.backend.torch.kernels.greedy import greedy
from pagoda.backend.torch.kernels.nucleus import nucleus
from pagoda.backend.torch.split import empty_result
from pagoda.backend.torch.upload import Rows
from pagoda.types import StepPlan, StepResult

_LOGPROB_ROWS = 32
"""Rows whose log-probabilities are computed at a time: each needs several times its logits in float64."""


@dataclass(frozen=True, slots=True)
class Logged:
    """Log-probabilities of some rows of a plan."""

    rows: list[int]
    chosen: Tensor  # float32 [n]
    ids: Tensor  # int64 [n, K]
    logprobs: Tensor  # float32 [n, K]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What came of rows first:last of a plan, still on the device. `tokens` int64 [2, n]: the tokens, and if usable."""

    first: int
    last: int
    tokens: Tensor
    logged: list[Logged]


def choose(logits: Tensor, rows: Rows, plan: StepPlan) -> Chosen:
    """Sample or score rows of raw logits [n, vocab] of any float type."""
    found = _found_there(logits, rows) if ops.on_gpu(logits) else _found(logits, rows)
    tops = plan.row_top[rows.first : rows.last]
    wanted, width = np.flatnonzero(tops >= 0), max(0, int(tops.max(initial=0)))
    pieces = [wanted[i : i + _LOGPROB_ROWS] for i in range(0, len(wanted), _LOGPROB_ROWS)]
    logged = [_log(logits, found[0], piece.tolist(), rows.first, width) for piece in pieces]
    return Chosen(rows.first, rows.last, found, logged)


def _found_there(logits: Tensor, rows: Rows) -> Tensor:
    """See kernels.greedy, for rows of any kind, by the kernels."""
    how = rows.sampling
    if how.plain:
        return greedy(logits, rows.targets)
    values = sampling.adjusted(logits if how.raw else logits.float(), how)
    if not how.random:
        found = greedy(values, rows.targets)
    else:
        found = drawn(values, rows.targets, how, _cuts_there(values, how))
    if how.raw:
        return found
    usable = found[1].bool() & logits.amax(-1).isfinite()
    return torch.stack((torch.where(usable | (rows.targets >= 0), found[0], sampling.NO_TOKEN), usable.long()))


def _cuts_there(values: Tensor, how: sampling.Sampling) -> Tensor | None:
    """See sampling.cuts; None where every token may be drawn."""
    cuts = nucleus(values, how) if how.nucleus else None
    if how.near or how.sorted:
        exact = values.float()
        own = sampling.cuts(exact, sampling.ranks(exact), replace(how, nucleus=False))
        cuts = own if cuts is None else torch.maximum(cuts, own)
    return cuts


def _found(logits: Tensor, rows: Rows) -> Tensor:
    """See kernels.greedy, for rows of any kind."""
    exact, given = logits.float(), rows.targets >= 0
    sampled = sampling.sample(exact, rows.sampling)
    usable = torch.where(given, exact.amax(-1).isfinite(), sampled >= 0)
    return torch.stack((torch.where(given, rows.targets, sampled), usable.long()))


def _log(logits: Tensor, tokens: Tensor, piece: list[int], first: int, width: int) -> Logged:
    places = sent(torch.tensor(piece), logits.device)
    own = logits.index_select(0, places).float()
    logprobs = sampling.log_softmax(own)
    chosen = logprobs.gather(-1, tokens.index_select(0, places).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    ids, top = sampling.top_logprobs(own, logprobs, min(width, own.shape[1]))
    return Logged([first + row for row in piece], chosen, ids, top)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for what is under way there."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Returning:
    """What was chosen, on its way to the host: a step that is launched behind does not hold it up."""

    def __init__(self, pieces: list[Chosen]) -> None:
        self._pieces = [_returned(piece) for piece in pieces]
        self._there: torch.cuda.Event | None = None
        if pieces and (there := pieces[0].tokens).is_cuda:
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record(torch.cuda.current_stream(there.device))

    def result(self, plan: StepPlan) -> StepResult:
        """Waits for the device."""
        if self._there is not None:
            self._there.synchronize()
        result = empty_result(plan)
        for piece in self._pieces:
            tokens, usable = piece.tokens.numpy()
            result.tokens[piece.first : piece.last], result.ok[piece.first : piece.last] = tokens, usable
            for logged in piece.logged:
                _fill(result, plan, logged)
        return result


def _returned(piece: Chosen) -> Chosen:
    logged = [Logged(m.rows, _to_host(m.chosen), _to_host(m.ids), _to_host(m.logprobs)) for m in piece.logged]
    return replace(piece, tokens=_to_host(piece.tokens), logged=logged)


def _to_host(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def _fill(result: StepResult, plan: StepPlan, logged: Logged) -> None:
    chosen, ids, logprobs = logged.chosen.numpy(), logged.ids.numpy(), logged.logprobs.numpy()
    for place, row in enumerate(logged.rows):
        if result.ok[row]:
            count = min(int(plan.row_top[row]), ids.shape[1])
            result.logprobs[row] = chosen[place]
            result.top_ids[row, :count] = ids[place, :count]
            result.top_logprobs[row, :count] = logprobs[place, :count]
