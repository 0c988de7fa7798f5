"""The meaning of sampling: the generator against published vectors, each parameter by hand, draws by chi-square."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference_plans import Feed, make_plan

from pagoda.backend import sampling
from pagoda.types import Float32, StepResult

INF = float("inf")
SAMPLE = [(0, -1, -1)]


def run(logits: list[float] | Float32, feed: Feed) -> StepResult:
    values = np.array([logits], np.float32)
    return sampling.sample_rows(values, make_plan([feed], values.shape[1]))


def token(logits: list[float] | Float32, **params: object) -> int:
    return int(run(logits, Feed([0], rows=SAMPLE, **params)).tokens[0])  # type: ignore[arg-type]


def test_philox_gives_the_published_vectors() -> None:
    full = 0xFFFFFFFF
    known = [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((full, full), (full, full, full, full), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for key, counter, words in known:
        assert " ".join(f"{w:08x}" for w in sampling.philox4x32_10(key, counter)) == words


def test_draws_use_all_of_the_seed_and_the_position() -> None:
    assert sampling.uniform(0, 0) == (0x6627E8D5 >> 8) / 2**24
    draws = {sampling.uniform(seed, position) for seed in (0, 1, 1 << 32, 1 << 63) for position in (0, 1, 2)}
    assert len(draws) == 12 and all(0 <= u < 1 for u in draws)


def test_draws_are_uniform() -> None:
    draws = np.array([sampling.uniform(seed, position) for seed in range(40) for position in range(100)])
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert np.square(counts - 200).sum() / 200 < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_tokens_come_with_their_probability(params: dict[str, float]) -> None:
    logits = np.array([1.0, -0.5, 2.0, 0.3, 0.0, 1.4, -2.0, 0.9], np.float32)
    expected = exact_distribution(logits, **params)
    number = 4000
    feed = Feed([0], rows=SAMPLE, **{"temperature": 1.0, **params})  # type: ignore[arg-type]
    plan = make_plan([feed], len(logits))
    draws = [sampling.sample(logits, replace(plan, seed=np.array([7], np.uint64)), 0, p) for p in range(number)]
    counts = np.bincount(np.array(draws), minlength=len(logits))
    possible = expected > 0
    assert not counts[~possible].any()
    deviation = np.square(counts[possible] - number * expected[possible]) / (number * expected[possible])
    assert deviation.sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def exact_distribution(
    logits: Float32, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """By definition, one token at a time."""
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0).tolist()
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or None]
    total, kept = sum(p[i] for i in ranked), []
    while ranked and (not kept or sum(p[i] for i in kept) < top_p * total):
        kept.append(ranked.pop(0))
    kept = [i for i in kept if p[i] >= min_p * max(p)]
    return np.array([p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))])


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    assert token([1.0, 3.0, 3.0, 2.0]) == 1


def test_top_k_keeps_the_lowest_ids_of_a_tie() -> None:
    ids, _ = sampling.distribution(np.array([1, 2, 5, 2, 2], np.float32), 1.0, 3, 1.0, 0.0)
    assert ids.tolist() == [1, 2, 3]


def test_top_p_keeps_the_shortest_prefix_that_reaches_it() -> None:
    logits = np.log(np.array([0.25, 0.5, 0.125, 0.125], np.float32))
    kept = {p: sampling.distribution(logits, 1.0, 0, p, 0.0)[0].tolist() for p in (0.0, 0.4, 0.6, 0.8, 0.9)}
    assert kept == {0.0: [1], 0.4: [1], 0.6: [0, 1], 0.8: [0, 1, 2], 0.9: [0, 1, 2, 3]}


def test_top_p_counts_the_share_of_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert sampling.distribution(logits, 1.0, 2, 0.55, 0.0)[0].tolist() == [0]  # 0.4 of 0.7 is 0.57
    assert sampling.distribution(logits, 1.0, 0, 0.55, 0.0)[0].tolist() == [0, 1]


def test_min_p_is_a_share_of_the_likeliest() -> None:
    logits = np.log(np.array([0.5, 0.26, 0.24], np.float32))
    assert sampling.distribution(logits, 1.0, 0, 1.0, 0.5)[0].tolist() == [0, 1]


def test_draw_is_the_inverse_of_the_cumulative_distribution_in_order_of_ids() -> None:
    ids, weights = np.array([3, 5, 9]), np.array([1.0, 2.0, 1.0])
    assert [sampling.draw(ids, weights, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24)] == [3, 3, 5, 5, 9, 9]


def test_a_tiny_temperature_is_greedy() -> None:
    assert token([1.0, 3.0, 2.0], temperature=1e-30) == 1


def test_a_token_depends_on_seed_and_position_of_its_row_only() -> None:
    logits = np.zeros((3, 64), np.float32)
    rows = [(1, -1, -1), (2, -1, -1), (3, -1, -1)]
    together = sampling.sample_rows(logits, make_plan([Feed([0] * 4, 10, rows=rows, temperature=1.0, seed=5)], 64))
    for i, got in enumerate(together.tokens):
        assert token(logits[0], temperature=1.0, seed=5, position=11 + i) == got
        assert got == int(sampling.uniform(5, 12 + i) * 64)


def test_repetition_divides_positive_logits_and_multiplies_negative_ones() -> None:
    feed = Feed([0], rows=SAMPLE, repetition=2.0, history={0: 0, 1: 3})
    out = sampling.adjusted(np.array([4, -1, 1], np.float32), make_plan([feed], 3), 0)
    assert out.tolist() == [2, -2, 1]


def test_frequency_and_presence_count_the_output_only() -> None:
    feed = Feed([0], rows=SAMPLE, frequency=0.5, presence=0.25, history={0: 0, 1: 1, 2: 3})
    out = sampling.adjusted(np.zeros(4, np.float32), make_plan([feed], 4), 0)
    assert out.tolist() == [0, -0.75, -1.75, 0]


def test_bias_comes_after_the_penalties() -> None:
    feed = Feed([0], rows=SAMPLE, repetition=2.0, history={0: 1}, bias=[(0, 3.0), (1, -INF)])
    assert sampling.adjusted(np.array([4, 9], np.float32), make_plan([feed], 2), 0).tolist() == [5, -INF]


def test_a_forbidden_token_stays_forbidden_when_it_is_raised_too() -> None:
    assert token([0.0, 9.0], bias=[(1, -INF), (1, 100.0)]) == 0


def test_mask_allows_by_bit() -> None:
    logits = np.arange(70, dtype=np.float32)
    assert token(logits, allowed=[3, 33, 64]) == 64
    assert token(logits, allowed=[3, 33]) == 33
    assert token(logits, allowed=[31]) == 31


@pytest.mark.parametrize("logits", [[1.0, float("nan")], [-INF, -INF], [1.0, INF]])
@pytest.mark.parametrize("target", [-1, 1])
def test_a_broken_row_is_not_ok_and_fails_alone(logits: list[float], target: int) -> None:
    rows = np.array([logits, [0.0, 1.0]], np.float32)
    result = sampling.sample_rows(rows, make_plan([Feed([0], rows=[(0, target, 1)]), Feed([0], rows=[(0, -1, 1)])], 2))
    assert result.ok.tolist() == [0, 1]
    assert result.tokens[1] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_allows_no_token_is_not_ok(temperature: float) -> None:
    result = run([1.0, 2.0], Feed([0], rows=SAMPLE, temperature=temperature, bias=[(0, -INF), (1, -INF)]))
    assert result.ok.tolist() == [0]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = [0.5, 2.0, 2.0, -1.0]
    feeds = [
        Feed([0], rows=[(0, -1, 3)], bias=[(3, 50.0)], repetition=1.5, history={1: 1}, temperature=0.3),
        Feed([0], rows=[(0, 2, 0)]),
        Feed([0], rows=[(0, -1, -1)]),
    ]
    result = sampling.sample_rows(np.array([logits] * 3, np.float32), make_plan(feeds, 4))
    expected = torch.log_softmax(torch.tensor(logits), 0).numpy()
    assert result.tokens.tolist() == [3, 2, 1]
    np.testing.assert_allclose(result.logprobs, [expected[3], expected[2], 0.0], rtol=1e-6)
    assert result.top_ids.tolist() == [[1, 2, 0], [-1] * 3, [-1] * 3]
    np.testing.assert_allclose(result.top_logprobs[0], expected[[1, 2, 0]], rtol=1e-6)


def test_more_top_tokens_than_there_are() -> None:
    result = run([1.0, 2.0], Feed([0], rows=[(0, -1, 4)]))
    assert result.top_ids.tolist() == [[1, 0, -1, -1]]
