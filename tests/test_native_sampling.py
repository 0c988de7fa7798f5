"""Native sampling against backend/sampling.py: the head's weight is the identity, so that logits are given exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from reference_plans import Feed, make_plan
from test_native_kernels import ISAS

from pagoda.backend import sampling
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.library import Native
from pagoda.backend.cpu.records import BufferShape, Dims, Op
from pagoda.types import StepPlan, StepResult

VOCAB = 1000
Run = Callable[[npt.NDArray[np.float32], StepPlan], StepResult]


@pytest.fixture(params=ISAS)
def run(request: pytest.FixtureRequest) -> Run:
    """Samples from given logits [L, VOCAB]: row l must be fed as token l of the plan."""

    def sample(logits: npt.NDArray[np.float32], plan: StepPlan) -> StepResult:
        lib = Native(2, request.param)
        embed = lib.weight([(np.ascontiguousarray(logits).view(np.uint8).ravel(), len(logits), VOCAB, "F32")])
        head = lib.weight([(np.eye(VOCAB, dtype=np.float32).view(np.uint8).ravel(), VOCAB, VOCAB, "F32")])
        inv_freq = np.ones(8)
        dims = Dims(1, 1, 1, 16, VOCAB, 128, 16, 64, 16, 0, 1.0, inv_freq.ctypes.data)
        ops = [
            Op(native.EMBED, -1, 0, embed, -1, -1, 0, 0, 0),
            Op(native.GATHER, 0, 1, -1, -1, -1, 0, native.LOGIT_ROWS, 0),
            Op(native.HEAD, 1, -1, head, -1, -1, 0, native.LOGIT_ROWS, 0),
        ]
        lib.program(dims, [BufferShape(VOCAB, 0), BufferShape(VOCAB, 1)], ops)
        result = lib.run(plan)
        lib.close()
        return result

    return sample


def some_feed(rng: np.random.Generator, row: int) -> Feed:
    """A request with random parameters that feeds the one token `row`."""
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    ids = rng.choice(VOCAB, 30, replace=False).tolist()
    return Feed(
        tokens=[row],
        position=int(rng.integers(900)),
        blocks=range(60),
        rows=[(0, pick(-1, -1, -1, 7), pick(-1, 0, 3, 20))],
        temperature=pick(0.0, 0.3, 1.0, 1.7),
        top_k=pick(0, 0, 1, 5, 40, 999),
        top_p=pick(1.0, 1.0, 0.1, 0.7, 0.95, 0.9999),
        min_p=pick(0.0, 0.0, 0.05, 0.5),
        presence=pick(0.0, 0.7),
        frequency=pick(0.0, -0.4),
        repetition=pick(1.0, 1.3),
        seed=int(rng.integers(2**63)),
        history={i: int(rng.integers(3)) for i in ids[:10]} if rng.random() < 0.4 else {},
        bias=[(i, pick(-np.inf, 2.0, -1.5)) for i in ids[10:20]] if rng.random() < 0.4 else (),
        allowed=ids[20:] if rng.random() < 0.2 else None,
    )


def test_tokens_and_log_probabilities_equal_the_reference(run: Run) -> None:
    rng = np.random.default_rng(11)
    different = 0
    for _ in range(20):
        feeds = [some_feed(rng, row) for row in range(48)]
        logits = (rng.standard_normal((48, VOCAB)) * rng.choice([0.5, 2.0, 6.0], (48, 1))).astype(np.float32)
        plan = make_plan(feeds, VOCAB)
        seen, expected = run(logits, plan), sampling.sample_rows(logits, plan)
        assert np.array_equal(seen.ok, expected.ok)
        same = seen.tokens == expected.tokens
        different += int((~same).sum())
        assert np.array_equal(seen.top_ids, expected.top_ids)
        assert np.allclose(seen.top_logprobs, expected.top_logprobs, atol=1e-4)
        assert np.allclose(seen.logprobs[same], expected.logprobs[same], atol=1e-4)
    assert different <= 2, "only a draw within rounding of a border may differ"


def test_greedy_ties_go_to_the_lowest_id(run: Run) -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [17, 400]] = 3.0
    plan = make_plan([Feed(tokens=[0], blocks=range(2), rows=[(0, -1, 2)])], VOCAB)
    result = run(logits, plan)
    assert result.tokens[0] == 17 and result.top_ids[0].tolist() == [17, 400]


def test_bad_rows_fail_alone(run: Run) -> None:
    logits = np.zeros((4, VOCAB), np.float32)
    logits[0, 3], logits[1, 999] = np.nan, np.inf
    feeds = [Feed(tokens=[row], blocks=range(2), rows=[(0, -1, 0)]) for row in range(4)]
    feeds[2].bias = [(i, -np.inf) for i in range(VOCAB)]
    assert run(logits, make_plan(feeds, VOCAB)).ok.tolist() == [0, 0, 0, 1]


def test_more_rows_than_the_head_takes_at_a_time(run: Run) -> None:
    rng = np.random.default_rng(12)
    logits = rng.standard_normal((100, VOCAB)).astype(np.float32)
    rows = [(i, -1 if i % 2 else 5, i % 4 - 1) for i in range(100)]
    plan = make_plan([Feed(tokens=range(100), blocks=range(10), rows=rows)], VOCAB)
    seen, expected = run(logits, plan), sampling.sample_rows(logits, plan)
    assert np.array_equal(seen.tokens, expected.tokens)
    assert np.allclose(seen.logprobs, expected.logprobs, atol=1e-4)
