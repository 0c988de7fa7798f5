"""What goes to the device, made ready for a step in Triton: tokens sampled there, the fixed buffers of CUDA graphs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.kernels import launch
from pagoda.backend.torch.kernels.launch import await_others


@triton.jit(do_not_specialize=["requests", "width", "pitch", "to_pitch"])
def _stage(
    tokens: tl.tensor,
    positions: tl.tensor,
    cells: tl.tensor,
    contexts: tl.tensor,
    rows: tl.tensor,
    slots: tl.tensor,
    tables: tl.tensor,
    to_tokens: tl.tensor,
    to_positions: tl.tensor,
    to_cells: tl.tensor,
    to_starts: tl.tensor,
    to_contexts: tl.tensor,
    to_rows: tl.tensor,
    to_slots: tl.tensor,
    to_tables: tl.tensor,
    requests: tl.tensor,
    width: tl.tensor,
    pitch: tl.tensor,
    to_pitch: tl.tensor,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    r = tl.program_id(0)
    here = r < requests
    tl.store(to_tokens + r, tl.load(tokens + r, mask=here, other=0))
    tl.store(to_positions + r, tl.load(positions + r, mask=here, other=0))
    tl.store(to_cells + r, tl.load(cells + r, mask=here, other=-1))
    tl.store(to_contexts + r, tl.load(contexts + r, mask=here, other=0))
    tl.store(to_rows + r, tl.load(rows + r, mask=here, other=0))
    tl.store(to_slots + r, tl.load(slots + r, mask=here, other=0))
    tl.store(to_starts + r, tl.minimum(r, requests))
    tl.store(to_starts + r + 1, tl.minimum(r + 1, requests))
    if here:
        for begin in range(0, width, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            blocks = tl.load(tables + r * pitch + at, mask=at < width, other=0)
            tl.store(to_tables + r * to_pitch + at, blocks, mask=at < width)


def stage(batch: Batch, fixed: Batch) -> None:
    """Copy a batch of single tokens into the tensors of a batch of as many requests or more; the rest is padding."""
    tables, to_tables = batch.block_tables, fixed.block_tables
    _stage[(len(fixed.contexts),)](
        batch.tokens, batch.positions, batch.cells, batch.contexts, batch.rows, batch.slots, tables, fixed.tokens,
        fixed.positions, fixed.cells, fixed.starts, fixed.contexts, fixed.rows, fixed.slots, to_tables,
        len(batch.contexts), tables.shape[1], tables.stride(0), to_tables.stride(0), BLOCK=256, num_warps=4,
        **launch.chained(batch.tokens.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _told(
    tokens: tl.tensor, sampled: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr, CHAINED: tl.constexpr
) -> None:
    await_others(CHAINED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + at, mask=at < count, other=0)
    found = tl.load(sampled - 1 - token, mask=(at < count) & (token < 0), other=0)
    token = tl.where(token < 0, tl.maximum(found, 0).to(tl.int32), token)
    tl.store(out + at, token, mask=at < count)


def told(tokens: Tensor, sampled: Tensor) -> Tensor:
    """See ops.told."""
    out = torch.empty_like(tokens)
    _told[(triton.cdiv(len(tokens), 1024),)](
        tokens, sampled, out, len(tokens), BLOCK=1024, num_warps=4, **launch.chained(tokens.device)
    )
    return out
