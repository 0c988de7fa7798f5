"""Top-k and top-p on the device: the tokens of the CPU's sampler, with no sort of the vocabulary for a small top-k."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pagoda.backend.torch import sampling
from pagoda.backend.torch.sampling import NEAREST, Sampling

ROWS = 64


def drawing(seed: int, top_k: list[int], top_p: list[float]) -> Sampling:
    """Rows that take the given values in turns."""
    zeros, ones = torch.zeros(ROWS), torch.ones(ROWS)
    at = torch.arange(ROWS)
    k = torch.tensor(top_k)[at % len(top_k)]
    p = torch.tensor(top_p, dtype=torch.float32)[at // 3 % len(top_p)]
    near = (k > 0) & (k <= NEAREST)
    far = ~near & ((k > 0) | (p < 1))
    return Sampling(
        ones * 1.3, k, p, zeros, at + seed * 1000, at, zeros, zeros, ones, None, None, None, True,
        bool(near.any()), bool(far.any()),
    )  # fmt: skip


def by_sorting(weights: Any, values: Any, k: int, p: float) -> Any:
    """One row, as backend/sampling.py says it: in numpy, all tokens sorted."""
    order = np.argsort(-values, kind="stable")
    ordered = weights[order]
    if k > 0:
        ordered[k:] = 0
    if p < 1:
        cumulative = np.cumsum(ordered)
        ordered[np.searchsorted(cumulative, p * cumulative[-1]) + 1 :] = 0
    out = np.zeros_like(weights)
    out[order] = ordered
    return out


@pytest.mark.parametrize("size", [5, NEAREST, 700, 5000])
@pytest.mark.parametrize("kind", ["spread", "alike", "few"])
@pytest.mark.parametrize("top_k", [[20, 1, NEAREST], [0, 40, NEAREST + 1, 4000], [0]])
def test_what_is_left_is_what_a_sort_leaves(size: int, kind: str, top_k: list[int]) -> None:
    torch.manual_seed(size)
    values = torch.randn(ROWS, size) * 3
    if kind == "alike":  # ties across every border
        values = values.round()
    if kind == "few":
        values[:, : size // 2] = float("-inf")
    how = drawing(size, top_k, [0.95, 0.3, 1.0, 0.999])
    weights = torch.exp((values.double() - values.double().amax(-1, keepdim=True)) / 1.3)
    left = sampling._shortened(values, weights, how) if how.near or how.sorted else weights
    for row in range(ROWS):
        wanted = by_sorting(weights[row].numpy(), values[row].numpy(), int(how.top_k[row]), float(how.top_p[row]))
        assert np.array_equal(left[row].numpy(), wanted), row


def test_the_others_of_a_batch_change_no_row() -> None:
    values = torch.randn(ROWS, 3000) * 2
    mixed = drawing(1, [20, 0, 300], [0.9, 1.0])
    near = (mixed.top_k > 0) & (mixed.top_k <= NEAREST)
    tokens = sampling.sample(values, mixed)
    only = replace(mixed, top_k=torch.where(near, mixed.top_k, 7), near=True, sorted=False)
    assert torch.equal(sampling.sample(values, only)[near], tokens[near])


def test_a_small_top_k_sorts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sort(*args: Any, **kinds: Any) -> None:
        raise AssertionError("the vocabulary was sorted")

    monkeypatch.setattr(torch, "sort", no_sort)
    values, how = torch.randn(ROWS, 3000), drawing(2, [20, 64], [0.9])
    assert (sampling.sample(values, how) >= 0).all()
    with pytest.raises(AssertionError, match="sorted"):
        sampling.sample(values, replace(how, top_k=how.top_k * 0, near=False, sorted=True))
