"""From rows of logits to a StepResult: chosen on the device, fetched when asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagoda.backend.torch import ops, sampling
from pagoda.backend.torch.kernels.greedy import greedy
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
    found = greedy(logits, rows.targets) if ops.on_gpu(logits) and rows.sampling.plain else _found(logits, rows)
    tops = plan.row_top[rows.first : rows.last]
    wanted, width = np.flatnonzero(tops >= 0), max(0, int(tops.max(initial=0)))
    pieces = [wanted[i : i + _LOGPROB_ROWS] for i in range(0, len(wanted), _LOGPROB_ROWS)]
    logged = [_log(logits, found[0], piece.tolist(), rows.first, width) for piece in pieces]
    return Chosen(rows.first, rows.last, found, logged)


def _found(logits: Tensor, rows: Rows) -> Tensor:
    """See kernels.greedy, for rows of any kind."""
    exact, given = logits.float(), rows.targets >= 0
    sampled = sampling.sample(exact, rows.sampling)
    usable = torch.where(given, exact.amax(-1).isfinite(), sampled >= 0)
    return torch.stack((torch.where(given, rows.targets, sampled), usable.long()))


def _log(logits: Tensor, tokens: Tensor, piece: list[int], first: int, width: int) -> Logged:
    own = logits[piece].float()
    logprobs = sampling.log_softmax(own)
    chosen = logprobs.gather(-1, tokens[piece].clamp_min(0).unsqueeze(-1)).squeeze(-1)
    ids, top = sampling.top_logprobs(own, logprobs, min(width, own.shape[1]))
    return Logged([first + row for row in piece], chosen, ids, top)


def fetch(plan: StepPlan, pieces: list[Chosen]) -> StepResult:
    """Waits for the device."""
    result = empty_result(plan)
    for piece in pieces:
        tokens, usable = piece.tokens.cpu().numpy()
        result.tokens[piece.first : piece.last], result.ok[piece.first : piece.last] = tokens, usable
        for logged in piece.logged:
            _fill(result, plan, logged)
    return result


def _fill(result: StepResult, plan: StepPlan, logged: Logged) -> None:
    chosen, ids, logprobs = logged.chosen.cpu().numpy(), logged.ids.cpu().numpy(), logged.logprobs.cpu().numpy()
    for place, row in enumerate(logged.rows):
        if result.ok[row]:
            count = min(int(plan.row_top[row]), ids.shape[1])
            result.logprobs[row] = chosen[place]
            result.top_ids[row, :count] = ids[place, :count]
            result.top_logprobs[row, :count] = logprobs[place, :count]
