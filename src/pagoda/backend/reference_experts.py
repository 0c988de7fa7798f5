"""Which experts a token goes through, and with what shares, in plain numpy and float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagoda.arch.spec import Experts, Mlp
from pagoda.backend.activations import ACTIVATIONS
from pagoda.types import Float32

LEAST_TOTAL = np.float32(1e-20)
"""Of the shares that are divided by their sum."""


def inner_slots(mlp: Mlp) -> tuple[str, ...]:
    return ("gate", "up") if mlp.gated else ("up",)


def activated(activation: str, first: Float32, up: Float32 | None = None) -> Float32:
    """What an MLP makes of its first products, of which the first may be a gate."""
    y = ACTIVATIONS[activation](first)
    return y if up is None else y * up


def route(e: Experts, logits: Float32, bias: Float32 | None = None) -> tuple[Float32, npt.NDArray[np.intp]]:
    """From what the router gives, [T, experts]: the share of each expert, and which ones are chosen, [T, active].

    The best come first, ties by lower number. `bias` [experts] counts for the choice alone.
    """
    shares: Float32
    if e.sigmoid:
        shares = np.asarray(1 / (1 + np.exp(-logits)))
    else:
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares = shares / shares.sum(axis=-1, keepdims=True)
    liked = _of_best_groups(e, shares if bias is None else np.asarray(shares + bias))
    chosen = np.argsort(-liked, axis=-1, kind="stable")[:, : e.active]
    if e.normalized:
        total = np.take_along_axis(shares, chosen, axis=-1).sum(axis=-1, keepdims=True)
        shares = np.asarray(shares / np.maximum(total, LEAST_TOTAL))
    return np.asarray(shares * np.float32(e.scale)), chosen


def _of_best_groups(e: Experts, liked: Float32) -> Float32:
    """-infinity for the experts of groups that are left out."""
    if e.groups == 1:
        return liked
    grouped = liked.reshape(len(liked), e.groups, -1)
    merit = np.sort(grouped, axis=-1)[..., -e.group_best :].sum(axis=-1)
    kept = np.argsort(-merit, axis=-1, kind="stable")[:, : e.active_groups]
    inside = (np.arange(e.groups) == kept[:, :, None]).any(axis=1)
    return np.where(inside[:, :, None], grouped, -np.inf).astype(np.float32).reshape(liked.shape)
