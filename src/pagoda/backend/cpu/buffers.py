"""The buffers that the operations of a decoder's program read and write, and what they take."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.arch.spec import Experts, ModelSpec
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.delta_program import delta_of, product_width
from pagoda.backend.cpu.records import BufferShape

MAX_ROWS = 32
"""Rows of logits that go through the head at a time; more are taken in turns."""

X, H, QKV, ATT, GATE_UP, MLP, LAST, LAST_NORMED, ROUTER, CHOSEN, LAST_ATT, LAST_GATE_UP, LAST_MLP, MIXED = range(14)
SHARED_GATE_UP, SHARED, Q_A, Q, MET, SUMS = range(14, 20)


def narrow_end(spec: ModelSpec) -> bool:
    """Whether, behind the attention of the last layer, only the rows go on that want logits: of a prompt one in all."""
    return spec.pooling is None and spec.layers[-1].mlp.experts is None


def buffer_shapes(spec: ModelSpec) -> Sequence[BufferShape]:
    """Width of each buffer, in the order of the constants."""
    a, h = spec.layers[0].attention, spec.hidden_size
    gated = 2 if spec.layers[0].mlp.gated else 1
    mlp, mixture = max(dense_sizes(spec), default=0), mixture_of(spec)
    shared = 0 if mixture is None else mixture.shared
    chosen = max((m.size * m.experts.active for m in (layer.mlp for layer in spec.layers) if m.experts), default=0)
    att, narrow, delta, latent = a.out_width, narrow_end(spec), delta_of(spec), a.latent
    mixed = 0 if delta is None else delta.value_width
    qkv = max(att * (1 + a.out_gate) + 2 * a.kv_heads * a.head_dim, 0 if delta is None else product_width(delta))
    last = att if spec.layers[-1].delta is None else mixed
    widths = [(h, 0), (h, 0), (qkv, 0), (att, 0), (gated * mlp, 0), (mlp, 0), (h, 1), (h, 1)]
    widths += [
        (0 if mixture is None else mixture.count, 0),
        (chosen, 0),
        (last * narrow, 1),
        (gated * mlp * narrow, 1),
        (mlp * narrow, 1),
    ]
    widths += [(mixed, 0), (2 * shared, 0), (shared, 0)]
    if latent is not None:
        met = (a.heads + 1) * a.head_dim
        widths += [(latent.q_rank, 0), (a.q_width if latent.q_rank else 0, 0), (met, 0), (a.heads * latent.rank, 0)]
        widths[QKV] = ((latent.q_rank or a.q_width) + a.head_dim, 0)
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


def dense_sizes(spec: ModelSpec) -> set[int]:
    """Of the MLPs of layers without experts."""
    return {layer.mlp.size for layer in spec.layers if layer.mlp.experts is None} - {0}
