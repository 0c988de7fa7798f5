"""Batches for tests of the Triton kernels, and what stands for a recorded graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pagoda.backend.torch.batch import Batch
from pagoda.types import BLOCK_SIZE


def make_batch(requests: Sequence[tuple[int, int]], *, device: str = "cpu", pad_tokens: int = 0) -> Batch:
    """Requests (tokens of this step, tokens before it) whose blocks are scattered; then tokens of no request."""
    counts = [count for count, _ in requests]
    contexts = [count + old if count else 0 for count, old in requests]
    width = max(1, max(-(-c // BLOCK_SIZE) for c in contexts))
    total = len(requests) * width
    tables = torch.randperm(total, generator=torch.Generator().manual_seed(1)).view(len(requests), width)
    positions = [old + i for count, old in requests for i in range(count)]
    owners = [r for r, count in enumerate(counts) for _ in range(count)]
    cells = [
        int(tables[r, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for r, p in zip(owners, positions, strict=True)
    ]

    def ints(values: object, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype, device=device)

    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return Batch(
        tokens=ints([0] * (len(positions) + pad_tokens)),
        positions=ints(positions + [0] * pad_tokens),
        cells=ints(cells + [-1] * pad_tokens, torch.int64),
        starts=ints(starts),
        contexts=ints(contexts),
        block_tables=ints(tables),
        slots=ints(range(len(counts))),
        rows=ints([]),
        max_query=max(counts),
        max_context=max(contexts),
    )


def again(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """Stands for a recording where there is no GPU: runs the call again, into the same result."""
    result = run()
    return lambda: result.copy_(run()), result
