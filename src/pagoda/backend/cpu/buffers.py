"""The buffers that the operations of a decoder's program read and write, and what they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pagoda.arch.spec import Experts, ModelSpec
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.delta_program import delta_of, product_width
from pagoda.backend.cpu.kinds import local_attention, main_attention
from pagoda.backend.cpu.records import BufferShape

MAX_ROWS = 32
"""Rows of logits that go through the head at a time; more are taken in turns."""

X, H, QKV, ATT, GATE_UP, MLP, LAST, LAST_NORMED, ROUTER, CHOSEN, LAST_ATT, LAST_GATE_UP, LAST_MLP, MIXED = range(14)
SHARED_GATE_UP, SHARED, Q_A, Q, MET, SUMS = range(14, 20)
# of layers whose heads, or MLPs, are not as the first one's; with values of their own; with experts beside an MLP
LOCAL_ATT, GATE_UP_2, MLP_2, LAYER_VALUES, OWN, LAST_VALUES, LAST_OWN, EXPERTS_SUM, LAYER_SUM = range(20, 29)


class Buffers(NamedTuple):
    """What a layer reads and writes behind its attention; the flags of operations that do."""

    x: int
    h: int
    att: int
    gate_up: int
    mlp: int
    values: int
    own: int
    flags: int = 0


TOKENS = Buffers(X, H, ATT, GATE_UP, MLP, LAYER_VALUES, OWN)
LOGITS = Buffers(LAST, LAST_NORMED, LAST_ATT, LAST_GATE_UP, LAST_MLP, LAST_VALUES, LAST_OWN, native.LOGIT_ROWS)


def buffers_of(spec: ModelSpec, i: int) -> Buffers:
    """Those of all tokens, for layer i."""
    layer, b = spec.layers[i], TOKENS
    if layer.delta is not None:
        b = b._replace(att=MIXED)
    elif layer.attention.local and local_attention(spec) is not None:
        b = b._replace(att=LOCAL_ATT)
    second = layer.mlp.experts is None and layer.mlp.size in dense_sizes(spec)[1:]
    return b._replace(gate_up=GATE_UP_2, mlp=MLP_2) if second else b


def narrow_end(spec: ModelSpec) -> bool:
    """Whether, behind the attention of the last layer, only the rows go on that want logits: of a prompt one in all."""
    return spec.pooling is None and spec.layers[-1].mlp.experts is None


def buffer_shapes(spec: ModelSpec) -> Sequence[BufferShape]:
    """Width of each buffer, in the order of the constants."""
    a, own, h = main_attention(spec), local_attention(spec), spec.hidden_size
    gated = 2 if spec.layers[0].mlp.gated else 1
    (mlp, mlp_2), mixture = (*dense_sizes(spec), 0, 0)[:2], mixture_of(spec)
    end = spec.layers[-1]
    shared = 0 if mixture is None else mixture.shared
    chosen = max((m.size * m.experts.active for m in (layer.mlp for layer in spec.layers) if m.experts), default=0)
    att, narrow, delta, latent = a.out_width, narrow_end(spec), delta_of(spec), a.latent
    mixed = 0 if delta is None else delta.value_width
    qkv = max(att * (1 + a.out_gate) + 2 * a.kv_heads * a.head_dim, 0 if delta is None else product_width(delta))
    if own is not None:
        qkv = max(qkv, own.out_width + 2 * own.kv_heads * own.head_dim)
    last = mixed if end.delta is not None else end.attention.out_width
    widths = [(h, 0), (h, 0), (qkv, 0), (att, 0), (gated * mlp, 0), (mlp, 0), (h, 1), (h, 1)]
    widths += [
        (0 if mixture is None else mixture.count, 0),
        (chosen, 0),
        (last * narrow, 1),
        (gated * end.mlp.size * narrow, 1),
        (end.mlp.size * narrow, 1),
    ]
    widths += [(mixed, 0), (2 * shared, 0), (shared, 0)]
    if latent is None:
        widths += [(0, 0)] * 4
    else:
        met = (a.heads + 1) * a.head_dim
        widths += [(latent.q_rank, 0), (a.q_width if latent.q_rank else 0, 0), (met, 0), (a.heads * latent.rank, 0)]
        widths[QKV] = ((latent.q_rank or a.q_width) + a.head_dim, 0)
    values, beside = spec.layer_embed * len(spec.layers), h * (mixture is not None and mixture.own_norms)
    widths += [
        (0 if own is None else own.out_width, 0),
        (gated * mlp_2, 0),
        (mlp_2, 0),
        (values, 0),
        (spec.layer_embed, 0),
    ]
    widths += [(values * narrow, 1), (spec.layer_embed * narrow, 1), (beside, 0), (beside, 0)]
    return [BufferShape(width, rows) for width, rows in widths]


def buffer_bytes(spec: ModelSpec, max_tokens: int) -> int:
    """What the buffers, the rows of logits and the RoPE table of a program take."""
    total = 0
    for shape in buffer_shapes(spec):
        rows = MAX_ROWS if shape.rows == native.LOGITS else max_tokens
        quantized = rows * shape.width + rows * (shape.width // 32) * 20 if shape.width % 32 == 0 else 0
        total += rows * shape.width * 4 + quantized
    logits = 0 if spec.pooling is not None else MAX_ROWS * spec.vocab_size * 4
    return total + logits + max_tokens * sum(rope.dim for rope in spec.ropes) * 4


def mixture_of(spec: ModelSpec) -> Experts | None:
    """The mixture that all layers with experts have."""
    return next((layer.mlp.experts for layer in spec.layers if layer.mlp.experts is not None), None)


def dense_sizes(spec: ModelSpec) -> list[int]:
    """Of the MLPs of layers without experts, each once."""
    sizes = (layer.mlp.size for layer in spec.layers if layer.mlp.experts is None)
    return [size for size in dict.fromkeys(sizes) if size]
