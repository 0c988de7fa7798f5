"""Operations of layers that have values of each token for themselves, and of experts with norms of their own."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pagoda.arch.spec import ModelSpec
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.buffers import (
    CHOSEN,
    EXPERTS_SUM,
    LAYER_SUM,
    LAYER_VALUES,
    ROUTER,
    SHARED,
    SHARED_GATE_UP,
    Buffers,
    H,
    X,
)


class Emit(Protocol):
    """See Program.emit."""

    def __call__(
        self, kind: int, *, in_: int = -1, out: int = -1, weight: str = "", vector: str = "", vector2: str = "",
        layer: int = 0, flags: int = 0, f: float = 0.0, f2: float = 0.0, window: int = 0, order: str = "",
    ) -> None: ...  # fmt: skip


PAD = 0
"""The token whose row of the second table those of pictures have."""


def norm_scale() -> float:
    """Of the norm in front of the sum with the second table."""
    return float(np.float32(2**-0.5))


def layer_values(spec: ModelSpec, emit: Emit) -> None:
    """The values of all layers, from the embeddings in X. To norm a product over the root of its inputs is to norm the
    product with an epsilon that is as much larger."""
    n, count = spec.layer_embed, len(spec.layers)
    eps = spec.norm_eps * spec.hidden_size
    emit(native.MATMUL, in_=X, out=LAYER_VALUES, weight="layer_project")
    emit(native.NORM, in_=LAYER_VALUES, out=LAYER_VALUES, vector="layer_project_norm", layer=count, f=eps)
    scale = n**0.5 * norm_scale()
    emit(native.EMBED, out=LAYER_VALUES, weight="layer_embed", layer=PAD, flags=native.ADD, f=scale)


def own_part(spec: ModelSpec, i: int, b: Buffers, emit: Emit, scale: float) -> None:
    """x += what a layer makes of its values; `scale`: of the sum."""
    p = f"layers.{i}."
    emit(native.MATMUL, in_=b.x, out=b.own, weight=p + "own_gate", flags=b.flags)
    emit(native.GELU_TIMES, in_=b.values, out=b.own, layer=i * spec.layer_embed, flags=b.flags)
    emit(native.MATMUL, in_=b.own, out=b.h, weight=p + "own_out", flags=b.flags)
    flags = native.ADD | b.flags
    emit(native.NORM, in_=b.h, out=b.x, vector=p + "own_post_norm", flags=flags, f=spec.norm_eps, f2=scale)


def mixture_beside(p: str, eps: float, emit: Emit, activation: int, flags: int, scale: float) -> None:
    """Experts beside an MLP, each with norms around it, and a norm of their sum."""

    def normed(name: str, in_: int, out: int, flags: int = 0, f2: float = 0.0) -> None:
        emit(native.NORM, in_=in_, out=out, vector=p + name, flags=flags, f=eps, f2=f2)

    normed("shared_norm", X, H)
    emit(native.MATMUL, in_=H, out=SHARED_GATE_UP, weight=p + "gate_up_shared")
    emit(activation, in_=SHARED_GATE_UP, out=SHARED)
    emit(native.MATMUL, in_=SHARED, out=H, weight=p + "down_shared")
    normed("shared_post_norm", H, LAYER_SUM)
    normed("router_norm", X, H)
    emit(native.MATMUL, in_=H, out=ROUTER, weight=p + "router")
    emit(native.ROUTE, in_=ROUTER, vector2=p + "router_scale")
    normed("experts_norm", X, H)
    emit(native.EXPERTS_UP, in_=H, out=CHOSEN, weight=p + "gate_up_experts", flags=flags)
    emit(native.ZERO, out=EXPERTS_SUM)
    emit(native.EXPERTS_DOWN, in_=CHOSEN, out=EXPERTS_SUM, weight=p + "down_experts")
    normed("experts_post_norm", EXPERTS_SUM, LAYER_SUM, native.ADD)
    normed("mlp_post_norm", LAYER_SUM, X, native.ADD, scale)
