"""Drawn tokens in Triton against plain PyTorch: the same for every seed, with and without top-k, top-p, min-p."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pagoda.backend.torch import ops, sampling
from pagoda.backend.torch.answer import _found, _found_there
from pagoda.backend.torch.kernels.nucleus import nucleus
from pagoda.backend.torch.sampling import Ragged, Sampling
from pagoda.backend.torch.upload import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 24


def how(seed: int, top_k: list[int], top_p: list[float]) -> Sampling:
    at, ones = torch.arange(ROWS, device=DEVICE), torch.ones(ROWS, device=DEVICE)
    k = torch.tensor(top_k, device=DEVICE)[at % len(top_k)]
    p = torch.tensor(top_p, device=DEVICE)[at // 2 % len(top_p)]
    near = (k > 0) & (k <= 256)
    heat = torch.where(at % 5 == 4, 0.0, 0.3 + at / 8)
    return Sampling(
        heat, k, p, torch.where(at % 3 == 1, 0.05, 0.0), (at + seed) * 0x123456789ABCD - (1 << 62), at * 7, ones * 0.5,
        ones * 0.1, ones * 1.2, None, None, None, True, bool(near.any()),
        bool((~near & (k > 0)).any()), bool(((k == 0) & (p < 1)).any()),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(7, torch.float32), (9000, torch.bfloat16), pytest.param(9000, torch.float32, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("top_k", "top_p"), [([0], [1.0]), ([20, 3], [0.9, 0.3, 1.0]), ([0, 300], [0.8, 1.0])], ids=["all", "near", "far"]
)
def test_the_tokens_of_plain_pytorch(size: int, top_k: list[int], top_p: list[float], dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    logits = (torch.randn(ROWS, size, device=DEVICE) * 3).to(dtype)
    logits[1] = 0.5
    logits[2, 2], logits[3], logits[5] = float("inf"), float("-inf"), float("nan")
    logits[6, 3:] = float("-inf")
    given = torch.full((ROWS,), -1, dtype=torch.int64, device=DEVICE)
    given[8] = 4
    for seed in range(1 if min(top_p) < 1 and 0 in top_k else 3):
        rows = Rows(0, ROWS, given, how(seed, top_k, top_p))
        assert torch.equal(_found_there(logits, rows), _found(logits, rows))


def test_a_top_p_ends_where_it_ends_for_the_sorted_vocabulary() -> None:
    torch.manual_seed(5)
    logits = (torch.randn(ROWS, 8500, device=DEVICE) * 4).to(torch.bfloat16)  # many are alike
    logits[0], logits[3], logits[6, 5:] = -2.5, -logits[3].abs(), 0.0
    shares = [0.9, 0.5, 0.999, 1e-6, 0.9999999, 1.0]
    asked = replace(how(0, [0, 0, 7], shares), near=False, sorted=False)
    own = (asked.top_k == 0) & (asked.top_p < 1) & (asked.temperature > 0)
    exact = logits.float()
    wanted = sampling.cuts(exact, sampling.ranks(exact), asked)
    found = nucleus(logits, asked)
    assert 6 < int(own.sum()) < ROWS and torch.equal(found[own], wanted[own])
    assert bool((found[~own] == torch.iinfo(torch.int64).min).all())


def test_with_a_history_and_a_bias() -> None:
    logits, at = torch.randn(ROWS, 300, device=DEVICE), torch.arange(ROWS, device=DEVICE)
    some = Ragged(at, at * 5, torch.full((ROWS,), 2.0, device=DEVICE))
    changed = replace(how(1, [0, 9], [1.0, 0.7]), history=some, bias=Ragged(at, at * 3, some.values * 4))
    logits[7, 1] = float("inf")
    rows = Rows(0, ROWS, torch.full((ROWS,), -1, dtype=torch.int64, device=DEVICE), changed)
    assert torch.equal(_found_there(logits, rows), _found(logits, rows))
    greedy = Rows(0, ROWS, rows.targets, replace(changed, random=False, temperature=changed.temperature * 0))
    assert torch.equal(_found_there(logits, greedy), _found(logits, greedy))
    assert ops.on_gpu(logits) == (DEVICE == "cuda")
