"""The Triton kernel of greedy rows against sampling in plain PyTorch: ties, rows that cannot be used, given tokens."""

from __future__ import annotations

import pytest
import torch

from pagoda.backend.torch import sampling
from pagoda.backend.torch.kernels.greedy import greedy
from pagoda.backend.torch.sampling import Sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(rows: int) -> Sampling:
    zeros, ones, none = torch.zeros(rows), torch.ones(rows), torch.zeros(rows, dtype=torch.int64)
    return Sampling(zeros, none, ones, zeros, none, none, zeros, zeros, ones, None, None, None, False, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [5, 8192, 20001])
def test_the_tokens_of_plain_pytorch(size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(8, size, device=DEVICE).to(dtype)
    logits[1] = 0.5  # all alike: the first
    logits[2, [3, size - 1]] = 50.0
    logits[3] = float("-inf")
    logits[4, 4] = float("nan")
    logits[5, 1] = float("inf")
    logits[6, :-1] = float("-inf")
    given = torch.full((8,), -1, dtype=torch.int64, device=DEVICE)
    given[7] = given[4] = 2
    tokens, usable = greedy(logits, given)
    wanted = sampling.sample(logits.float(), plain(8))
    assert usable.tolist() == (wanted >= 0).long().tolist()
    assert tokens.tolist() == torch.where(given >= 0, given, wanted).tolist()


def test_rows_that_lie_apart_and_none() -> None:
    logits = torch.randn(4, 300, device=DEVICE)
    given = torch.full((4,), -1, dtype=torch.int64, device=DEVICE)
    assert greedy(logits[:, :100], given)[0].tolist() == logits[:, :100].argmax(-1).tolist()
    assert greedy(logits[:0], given[:0]).shape == (2, 0)


def test_rows_that_need_more_are_not_plain() -> None:
    how = plain(1)
    some = torch.zeros(1, dtype=torch.int64)
    assert how.plain
    for name, value in {"random": True, "bias": sampling.Ragged(some, some, some), "mask": (some, some)}.items():
        changed = {field: getattr(how, field) for field in how.__slots__} | {name: value}
        assert not Sampling(**changed).plain
