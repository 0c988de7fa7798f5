"""The meaning of sampling: from a row of raw logits to a token and log-probabilities, in plain numpy.

Order: log-probabilities of the raw logits; penalties, biases, mask (in float32, one rounding per operation, so that
another implementation can match them bit for bit); then in float64 temperature, top-k, top-p, min-p; then the inverse
of the cumulative distribution in the order of token ids.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagoda.types import Float32, StepPlan, StepResult

Float64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
NO_TOKEN = -1
_WORD = 0xFFFFFFFF


def philox4x32_10(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of the counter-based generator Philox4x32 (Salmon et al., SC 2011)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) that belongs to a seed and to the absolute position of the sampled token."""
    word = philox4x32_10((seed & _WORD, seed >> 32 & _WORD), (position & _WORD, 0, 0, 0))[0]
    return (word >> 8) * 2.0**-24


def log_softmax(logits: Float32) -> Float32:
    values = logits.astype(np.float64)
    shifted = values - values.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float32)


def best(values: npt.NDArray[np.floating], count: int) -> Ids:
    """The ids of the `count` largest values, best first, ties by lower id."""
    if 0 < count < len(values):
        bound = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= bound)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def adjusted(logits: Float32, plan: StepPlan, row: int) -> Float32:
    """The logits of a row after penalties and biases of its request, and its own mask."""
    out, request = logits.copy(), int(plan.row_request[row])
    history = slice(plan.history_start[request], plan.history_start[request + 1])
    ids, counts = plan.history_ids[history], plan.history_counts[history]
    seen, repetition = out[ids], plan.repetition[request]
    seen = np.where(seen > 0, seen / repetition, seen * repetition)
    seen = seen - plan.frequency[request] * counts.astype(np.float32)
    out[ids] = np.where(counts > 0, seen - plan.presence[request], seen)
    biased = slice(plan.bias_start[request], plan.bias_start[request + 1])
    # add.at: an id may be biased twice (min_tokens forbids what logit_bias raises)
    np.add.at(out, plan.bias_ids[biased], plan.bias_values[biased])
    if plan.row_mask[row] >= 0:
        words = plan.masks[plan.row_mask[row]].astype("<u4")
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(out)].astype(bool)
        out[~allowed] = -np.inf
    return out


def distribution(logits: Float32, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Ids, Float64]:
    """The token ids that may be drawn, ascending, and their weights (not normalized); temperature above 0."""
    values = logits.astype(np.float64)
    ids = np.flatnonzero(logits > -np.inf)
    if 0 < top_k < len(ids):
        ids = ids[best(logits[ids], top_k)]
    weights = np.exp((values[ids] - values[ids].max()) / temperature)
    if top_p < 1.0:
        order = np.lexsort((ids, -weights))
        ids, weights = ids[order], weights[order]
        cumulative = np.cumsum(weights)
        shortest = int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left")) + 1
        ids, weights = ids[:shortest], weights[:shortest]
    likely = weights >= min_p * weights.max()
    ids, weights = ids[likely], weights[likely]
    order = np.argsort(ids)
    return ids[order], weights[order]


def draw(ids: Ids, weights: Float64, u: float) -> int:
    """The first id whose cumulative weight exceeds `u` of the total."""
    cumulative = np.cumsum(weights)
    return int(ids[np.searchsorted(cumulative, u * cumulative[-1], side="right")])


def sample(logits: Float32, plan: StepPlan, row: int, position: int) -> int | None:
    """The token at `position` of a request, None where no token is possible."""
    values, request = adjusted(logits, plan, row), int(plan.row_request[row])
    top = values.max()
    if not np.isfinite(top):
        return None
    temperature = float(plan.temperature[request])
    if temperature == 0:
        return int(values.argmax())
    top_k, top_p, min_p = int(plan.top_k[request]), float(plan.top_p[request]), float(plan.min_p[request])
    ids, weights = distribution(values, temperature, top_k, top_p, min_p)
    return draw(ids, weights, uniform(int(plan.seed[request]), position))


def sample_rows(logits: Float32, plan: StepPlan) -> StepResult:
    """The result of a step from its rows of raw logits [L, vocab].

    A row that holds a NaN or +inf, or whose request allows no token, is not ok; its token is -1 unless it was given.
    """
    count, width = len(plan.rows), max(0, int(plan.row_top.max(initial=0)))
    result = StepResult(
        tokens=plan.row_target.astype(np.int32),
        logprobs=np.zeros(count, np.float32),
        top_ids=np.full((count, width), NO_TOKEN, np.int32),
        top_logprobs=np.zeros((count, width), np.float32),
        ok=np.zeros(count, np.uint8),
    )
    for row in range(count):
        _fill(result, row, logits[row], plan)
    return result


def _fill(result: StepResult, row: int, logits: Float32, plan: StepPlan) -> None:
    if not np.isfinite(logits.max()):  # max passes a NaN on
        return
    if plan.row_target[row] == NO_TOKEN:
        token = sample(logits, plan, row, row_position(plan, row) + 1)
        if token is None:
            return
        result.tokens[row] = token
    result.ok[row] = 1
    top = int(plan.row_top[row])
    if top < 0:
        return
    logprobs = log_softmax(logits)
    result.logprobs[row] = logprobs[result.tokens[row]]
    ids = best(logits, top)
    result.top_ids[row, : len(ids)] = ids
    result.top_logprobs[row, : len(ids)] = logprobs[ids]


def row_position(plan: StepPlan, row: int) -> int:
    """The absolute position of the token whose final hidden state a row takes."""
    request = plan.row_request[row]
    return int(plan.positions[request] + plan.rows[row] - plan.starts[request])
