"""The operations of a decoder step on tensors: what each means, in plain PyTorch; on a GPU the kernels do it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.spec import Experts
from pagoda.backend.torch.batch import Batch, Heads, Routed
from pagoda.backend.torch.kernels import activation as activations
from pagoda.backend.torch.kernels import attention, decode, experts, latent, norm, rope, stage
from pagoda.backend.torch.kernels import matmul as products
from pagoda.backend.torch.packs import F8, FP8, FP8_MAX, I8, M4, W4, W8, Dense, Weight
from pagoda.types import BLOCK_SIZE

_TILE = 16
"""Rows of a matrix product on a CPU: always the same, so that a row's bits do not depend on how many come with it."""


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return x.is_cuda


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] / root mean square of its last axis, times weight [n]; computed in float32, returned as x's type."""
    if on_gpu(x):
        return norm.rms_norm(x, weight, eps)
    values = x.float()
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (values * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to x's type before it is normed."""
    if on_gpu(x):
        return norm.add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope_and_cache(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos_sin: Tensor,
    batch: Batch,
    k_cache: Tensor,
    v_cache: Tensor,
    shape: Heads,
) -> Tensor:
    """Split qkv [T, (heads + 2 * kv_heads) * head_dim], norm the heads of q and k where norms [head_dim] are given
    (or all of them together where the norms are that wide),
    turn them by the angles of their positions, write k and v into the cache, return q [T, heads, head_dim].

    `cos_sin` float32 [positions, dim]: cosines of the dim / 2 pairs, then sines; dim may be below head_dim.
    `k_cache` and `v_cache` [num_blocks, BLOCK_SIZE, kv_heads, head_dim], in qkv's type or in FP8 (clamped, no scale).
    """
    if q_norm is not None and k_norm is not None and len(q_norm) > shape.head_dim:
        qkv, q_norm, k_norm = _normed_whole(qkv, q_norm, k_norm, shape.eps), None, None
    if on_gpu(qkv):
        return rope.rope_and_cache(qkv, q_norm, k_norm, cos_sin, batch, k_cache, v_cache, shape)
    a = shape
    q, k, v = torch.split(torch.unflatten(qkv, -1, (-1, a.head_dim)), [a.heads, a.kv_heads, a.kv_heads], dim=1)
    norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
    if norms and not a.late:
        q, k = rms_norm(q, norms[0], a.eps), rms_norm(k, norms[1], a.eps)
    table = cos_sin[batch.positions].unsqueeze(1)
    q, k = rotate(q, table, a.interleaved), rotate(k, table, a.interleaved)
    if norms and a.late:
        q, k = rms_norm(q, norms[0], a.eps), rms_norm(k, norms[1], a.eps)
    written = batch.cells >= 0
    cells = batch.cells[written]
    k_cache.flatten(0, 1)[cells] = _as_cached(k[written], k_cache.dtype)
    v_cache.flatten(0, 1)[cells] = _as_cached(v[written], v_cache.dtype)
    return q


def rope_and_keep(q: Tensor, key: Tensor, cos_sin: Tensor, batch: Batch, k_cache: Tensor, shape: Heads) -> Tensor:
    """Turn q [T, heads, head_dim] and key [T, head_dim], write the key into the cache, return q."""
    table = cos_sin[batch.positions].unsqueeze(1)
    both = rotate(torch.cat((q, key.unsqueeze(1)), dim=1), table, shape.interleaved)
    kept = _as_cached(both[:, -1:], k_cache.dtype)
    cells = k_cache.flatten(0, 1)
    if on_gpu(q):
        latent.keep(kept, cells, batch.cells)
    else:
        written = batch.cells >= 0
        cells[batch.cells[written]] = kept[written]
    return both[:, :-1].contiguous()


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """[T, heads, out] of x [T, heads, in]: each head times the transpose of its own of weight [heads, out, in]."""
    if on_gpu(x) and x.is_cuda:
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    return torch.stack([_product(x[:, head], own) for head, own in enumerate(weight)], dim=1)


def _normed_whole(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float) -> Tensor:
    """qkv with q and k normed over all their heads together."""
    q, k, v = torch.split(qkv, [len(q_norm), len(k_norm), qkv.shape[-1] - len(q_norm) - len(k_norm)], dim=-1)
    return torch.cat((rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps), v), dim=-1)


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    dim = table.shape[-1]
    cos, sin = table.chunk(2, dim=-1)
    values = x[..., :dim].float()
    first, second = (values[..., 0::2], values[..., 1::2]) if interleaved else values.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((out.to(x.dtype), x[..., dim:]), dim=-1)


def _as_cached(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype == FP8 else values.to(dtype)


def told(tokens: Tensor, sampled: Tensor) -> Tensor:
    """int32 [T]: the tokens, a number -1 - l replaced by sampled[l] (0 where that row had no token)."""
    if on_gpu(tokens):
        return stage.told(tokens, sampled)
    return torch.where(tokens < 0, sampled[(-1 - tokens).clamp_min(0)], tokens).clamp_min(0).int()


def prepared(batch: Batch) -> Batch:
    """The batch with what the layers share, worked out once in a step; without it each layer does it for itself."""
    if not on_gpu(batch.tokens) or not len(batch.contexts):
        return batch
    return replace(batch, runs=decode.count_runs(batch.starts, batch.contexts))


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, shape: Heads, sinks: Tensor | None = None
) -> Tensor:
    """Each token of q [T, heads, head_dim] over the keys of its request up to its own position (of `window` at most).

    `sinks` float32 [heads]: logits beside the scores, that have no value.

    Scores and sums are float32. Returns q's type, as much for each head as a value has. Keys and values of the step are
    in the cache already.
    """
    if on_gpu(q):
        if shape.turned:
            return latent.latent_attention(q, k_cache, batch, shape)
        out = attention.paged_attention(q, k_cache, v_cache, batch, shape, sinks)
        return _with_ahead(out, q, k_cache, v_cache, batch, shape)
    out = q.new_zeros(*q.shape[:-1], v_cache.shape[-1])
    starts, contexts = batch.starts.tolist(), batch.contexts.tolist()
    for r, context in enumerate(contexts):
        first, last = starts[r], starts[r + 1]
        if first == last:
            continue
        blocks = batch.block_tables[r, : -(-context // BLOCK_SIZE)]
        keys = k_cache[blocks].flatten(0, 1)[:context].float()
        values = v_cache[blocks].flatten(0, 1)[:context].float()
        for token in range(first, last):
            end = context - (last - 1 - token)
            begin = 0 if shape.window is None else max(0, end - shape.window)
            out[token] = _attend(q[token], keys[begin:end], values[begin:end], shape, sinks)
    return _with_ahead(out, q, k_cache, v_cache, batch, shape)


def attend(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos_sin: Tensor,
    batch: Batch,
    k_cache: Tensor,
    v_cache: Tensor,
    shape: Heads,
    sinks: Tensor | None = None,
) -> Tensor:
    """rope_and_cache, and paged_attention of the queries it gives."""
    by_head = q_norm is None or len(q_norm) == shape.head_dim
    if on_gpu(qkv) and batch.max_query == 1 and batch.runs is not None and by_head:
        fresh = decode.Fresh(q_norm, k_norm, cos_sin)
        return attention.attend_single(qkv, fresh, k_cache, v_cache, batch, shape, sinks)
    q = rope_and_cache(qkv, q_norm, k_norm, cos_sin, batch, k_cache, v_cache, shape)
    return paged_attention(q, k_cache, v_cache, batch, shape, sinks)


def _with_ahead(out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, shape: Heads) -> Tensor:
    """With the results anew of tokens that see others behind them."""
    for run in batch.ahead:
        end = run.position + run.last - run.first
        begin = 0 if shape.window is None else max(0, run.position + 1 - shape.window)
        blocks = batch.block_tables[run.request, begin // BLOCK_SIZE : -(-end // BLOCK_SIZE)]
        skipped = begin // BLOCK_SIZE * BLOCK_SIZE
        keys, values = (
            cache[blocks].flatten(0, 1)[begin - skipped : end - skipped].to(q.dtype).transpose(0, 1)
            for cache in (k_cache, v_cache)
        )
        mask = None
        if shape.window is not None and end > shape.window:
            first = torch.arange(run.position, end, device=q.device)[:, None] + 1 - shape.window
            mask = torch.arange(begin, end, device=q.device) >= first
        seen = F.scaled_dot_product_attention(
            q[run.first : run.last].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            scale=shape.scale,
            enable_gqa=shape.heads != shape.kv_heads,
        )
        out[run.first : run.last] = seen[0].transpose(0, 1)
    return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, shape: Heads, sinks: Tensor | None) -> Tensor:
    grouped = torch.unflatten(q.float(), 0, (shape.kv_heads, -1))
    scores = soft_capped(grouped @ keys.permute(1, 2, 0) * shape.scale, shape.soft_cap)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(shape.kv_heads, -1, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(keys)]
    return (weights @ values.transpose(0, 1)).flatten(0, 1).to(q.dtype)


def soft_capped(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap), computed in float32."""
    return x if cap is None else (torch.tanh(x.float() / cap) * cap).to(x.dtype)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """An activation of the first half of gate_up [T, 2 * size] times the second, computed in float32.

    `silu`; `gelu_tanh`; `clamped_swiglu`: g * sigmoid(1.702 g) * (u + 1), g at most 7, u within -7 and 7.
    """
    if on_gpu(gate_up):
        return activations.gated(gate_up, activation)
    gate, up = gate_up.float().chunk(2, dim=-1)
    match activation:
        case "silu":
            product = F.silu(gate) * up
        case "gelu_tanh":
            product = F.gelu(gate, approximate="tanh") * up
        case _:
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            product = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return product.to(gate_up.dtype)


def matmul(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times the transpose of the weight, plus bias [out], in x's type; sums are float32."""
    if on_gpu(x) and (done := products.matmul(x, weight)) is not None:
        return done if bias is None else done + bias
    match weight:
        case Dense():
            y = _product(x, weight.data)
        case W4() | W8():
            y = _product(x if weight.order is None else x[:, weight.order], weight.floats().to(x.dtype))
        case M4():
            y = _product(x, weight.floats().to(x.dtype))
        case I8():
            y = matmul_i8(x, weight)
        case F8():
            y = matmul_f8(x, weight)
    return y if bias is None else y + bias


def norm_matmul(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Weight, *, gate: bool = False
) -> tuple[Tensor, Tensor]:
    """add_rms_norm and the product of that with a weight (`gate`: silu of its first half times the second); and the sum
    x + residual."""
    if on_gpu(x):
        done = products.fused(x, weight, products.Norm(residual, norm_weight, eps), gated=gate)
        if done is not None:
            return done
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    return (gated_matmul(normed, weight) if gate else matmul(normed, weight)), total


def gated_product(gate_up: Tensor, activation: str, weight: Weight) -> Tensor:
    """The product of `gated` with a weight."""
    if on_gpu(gate_up) and (done := products.gated_product(gate_up, activation, weight)) is not None:
        return done
    return matmul(gated(gate_up, activation), weight)


def has_coded_inputs(x: Tensor, weight: Weight) -> bool:
    """Whether `gated_product` of as many rows makes codes at once of what it is given."""
    return on_gpu(x) and products.coded_inputs(len(x), weight, x.device) > 0


def gated_matmul(x: Tensor, weight: Weight) -> Tensor:
    """`gated` by silu of the product of x with a weight."""
    if on_gpu(x) and (done := products.gated_few(x, weight)) is not None:
        return done
    return gated(matmul(x, weight), "silu")


def matmul_i8(x: Tensor, weight: I8) -> Tensor:
    """Whole numbers on both sides: exact sums, whatever comes with a row."""
    codes, scale = quantize_rows(x)
    sums = torch._int_mm(codes, weight.codes.t())
    return (sums.float() * scale * weight.scales).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [T, n] and float32 scales [T, 1] of x [T, n]: largest magnitude 127, rounded to the nearest even."""
    if on_gpu(x):
        return norm.quantize_rows(x)
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
    return (x.float() / scale).round().to(torch.int8), scale


def matmul_f8(x: Tensor, weight: F8) -> Tensor:
    """FP8 on both sides, or on the side of the weight only."""
    if weight.quantize_input:
        size = x.shape[-1] if weight.block is None else weight.block[1]
        codes, scales = quantize_f8(x, size, weight.input_scale)
        x32 = codes.float() * scales.repeat_interleave(size, -1)[..., : x.shape[-1]]
    else:
        x32 = x.float()
    return _product(x32, weight.floats()).to(x.dtype)


def quantize_f8(x: Tensor, size: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FP8 codes [T, n] and float32 scales [T, ceil(n / size)] of x [T, n]: the largest of each run of `size` is 448."""
    if on_gpu(x):
        return norm.quantize_f8(x, size, scale)
    values = torch.unflatten(F.pad(x.float(), (0, -x.shape[-1] % size)), -1, (-1, size))
    scales = values.abs().amax(-1).clamp_min(1e-10) / FP8_MAX if scale is None else scale.expand(values.shape[:-1])
    codes = (values / scales.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8).flatten(-2)
    return codes[..., : x.shape[-1]], scales


def grouped_matmul(
    x: Tensor,
    weight: Weight,
    starts: Tensor,
    tokens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """Rows starts[e]:starts[e + 1] of x [M, in] times expert e of a weight [experts, out, in]; starts int32 [E + 1].

    `tokens` int32 [M]: the rows are x[tokens]. `bias` [experts, out] is added, and `activation` makes it `gated`.
    """
    if on_gpu(x):
        return products.grouped(x, weight, starts, tokens, bias=bias, activation=activation)
    x = x if tokens is None else x[tokens]
    bounds = starts.tolist()
    out = x.new_zeros(len(x), weight.rows)
    for e in range(len(bounds) - 1):
        if bounds[e] < bounds[e + 1]:
            own = None if bias is None else bias[e]
            out[bounds[e] : bounds[e + 1]] = matmul(x[bounds[e] : bounds[e + 1]], weight.expert(e), own)
    return gated(out, activation) if activation else out


def routed(logits: Tensor, e: Experts, bias: Tensor | None = None) -> Routed:
    """Where each token goes; see `route`."""
    active, plain = e.active, not e.sigmoid and bias is None and e.groups == 1 and e.scale == 1
    if plain and on_gpu(logits) and experts.fits(logits):
        return experts.route(logits, active, e.normalized)
    shares, ids = route(logits, e, bias)
    owners, order = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(owners, torch.arange(logits.shape[1] + 1, device=logits.device)).int()
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return Routed(shares, starts, (order // active).int(), owners.int(), places.view(ids.shape).int())


def combined(rows: Tensor, routed: Routed, dtype: torch.dtype) -> Tensor:
    """What each token gets of its experts' rows [M, n], by its shares; summed in float32."""
    if on_gpu(rows):
        return experts.combine(rows, routed, dtype)
    return (rows.float()[routed.places] * routed.shares.unsqueeze(-1)).sum(1).to(dtype)


def route(logits: Tensor, e: Experts, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `e.active` experts that each token takes, from the router's logits [T, experts]: shares float32 [T, active]
    and ids int64 [T, active]. `bias` float32 [experts] counts for the choice alone.
    """
    all_shares = torch.sigmoid(logits.float()) if e.sigmoid else torch.softmax(logits.float(), dim=-1)
    liked = all_shares if bias is None else all_shares + bias
    if e.groups > 1:
        grouped = torch.unflatten(liked, -1, (e.groups, -1))
        kept = grouped.topk(e.group_best, dim=-1).values.sum(-1).topk(e.active_groups, dim=-1).indices
        inside = torch.zeros_like(grouped[..., 0]).scatter_(-1, kept, 1.0).bool()
        liked = grouped.masked_fill(~inside.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = liked.topk(e.active, dim=-1).indices
    shares = all_shares.gather(-1, ids)
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(1e-20) if e.normalized else shares
    return (shares if e.scale == 1 else shares * e.scale), ids


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] times the transpose of weight [out, in]."""
    if x.is_cuda:
        return F.linear(x, weight)
    padded = F.pad(x, (0, 0, 0, -len(x) % _TILE))
    return torch.cat([F.linear(tile, weight) for tile in torch.split(padded, _TILE)] or [x @ weight.t()])[: len(x)]
