"""Where tokens go among experts, and what comes back, in Triton against plain PyTorch."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from pagoda.arch.spec import Experts
from pagoda.backend.torch import ops
from pagoda.backend.torch.kernels import experts, matmul
from pagoda.backend.torch.packs import Dense, pack_w4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("tokens", "count", "active"), [(1, 128, 8), (5, 4, 2), (33, 60, 4), (3, 2, 2), (64, 8, 1)])
def test_tokens_go_where_plain_pytorch_sends_them(tokens: int, count: int, active: int, normalized: bool) -> None:
    logits = torch.randn(tokens, count, device=DEVICE)
    found, wanted = experts.route(logits, active, normalized), ops.routed(logits, Experts(count, active, normalized))
    assert experts.fits(logits)
    torch.testing.assert_close(found.shares, wanted.shares, rtol=1e-5, atol=1e-6)
    for field in fields(found):
        if field.name != "shares":
            assert torch.equal(getattr(found, field.name), getattr(wanted, field.name)), field.name


def test_alike_and_no_numbers() -> None:
    logits = torch.zeros(3, 6, device=DEVICE)
    logits[1, 2:] = float("nan")
    logits[2] = float("-inf")
    found = experts.route(logits, 2, True)
    assert found.owners.tolist() == [0, 0, 0, 1, 1, 1] and found.places.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found.starts.tolist() == [0, 3, 6, 6, 6, 6, 6]
    assert not experts.fits(torch.empty(600, 128)) and not experts.fits(logits[:0])


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_rows_of_experts_and_their_sum(tokens: int) -> None:
    x, router = torch.randn(tokens, 256, device=DEVICE), torch.randn(tokens, 6, device=DEVICE)
    router[:, 3] = -100.0  # nobody goes there
    to = ops.routed(router, Experts(6, 2, True))
    codes = torch.randint(0, 16, (6, 48, 256), dtype=torch.uint8, device=DEVICE)
    four = pack_w4(codes, torch.rand(6, 8, 48, device=DEVICE), torch.full((6, 8, 48), 8.0, device=DEVICE))
    for weight in (Dense(torch.randn(6, 48, 256, device=DEVICE)), four):
        got = matmul.grouped(x, weight, to.starts, to.tokens)
        wanted = ops.grouped_matmul(x, weight, to.starts, to.tokens)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(
            experts.combine(wanted, to, torch.float32), ops.combined(wanted, to, torch.float32), rtol=1e-4, atol=1e-4
        )
