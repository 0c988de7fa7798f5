"""Weights joined: matrices with one input side by side (QKV, gate and up), the experts of a layer in a stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor

from pagoda.backend.torch.packs import F8, FP8, I8, M4, W4, W8, Dense, Weight


def side_by_side(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """One weight whose outputs are those of all, where they are stored alike; else the weights as they are."""
    first = weights[0]
    if len(weights) == 1:
        return (first,)
    if any(type(w) is not type(first) for w in weights):  # those that follow each other may still go together
        return tuple(w for _, run in groupby(weights, key=type) for w in side_by_side(list(run)))
    match first:
        case Dense() | I8():
            return (_concatenated(weights, {"data": -2, "codes": -2, "scales": -1}),)
        case W4() | W8():
            alike = all(_same_groups(first, w) for w in weights)
            return (_concatenated(weights, {"codes": -2, "scales": -1, "zeros": -1}),) if alike else tuple(weights)
        case M4():
            return (_concatenated(weights, {"codes": -2, "scales": -1}),)
        case F8():
            return _fp8(weights)  # type: ignore[arg-type]


def _same_groups(a: Any, b: Any) -> bool:
    same_order = a.order is b.order or (a.order is not None and b.order is not None and torch.equal(a.order, b.order))
    alike = (a.zeros is None) == (b.zeros is None) and getattr(a, "whole", None) == getattr(b, "whole", None)
    return bool(a.scales.shape[-2] == b.scales.shape[-2] and alike and same_order)


def _fp8(weights: Sequence[F8]) -> tuple[Weight, ...]:
    first = weights[0]
    scales = [w.input_scale for w in weights]
    if any(w.block != first.block or (s is None) != (scales[0] is None) for w, s in zip(weights, scales, strict=True)):
        return tuple(weights)
    if scales[0] is not None and any(bool(s != scales[0]) for s in scales):
        return tuple(weights)
    if first.block is not None and any(w.rows % first.block[0] for w in weights[:-1]):
        return tuple(weights)
    if first.block is None:
        # a scale for each output says the same as one for the matrix
        rows = [replace(w, scales=w.scales.expand(*w.codes.shape[:-1], 1)) for w in weights]
        return (_concatenated(rows, {"codes": -2, "scales": -2}),)
    return (_concatenated(weights, {"codes": -2, "scales": -2}),)


def stacked(weights: Sequence[Weight]) -> Weight:
    """Experts that are stored alike, as one weight with a leading axis."""
    stack = {f.name: partial(torch.stack, dim=0) for f in fields(weights[0]) if f.name != "input_scale"}
    joined = _joined(weights, stack)
    if isinstance(joined, F8) and joined.input_scale is not None:
        # one for all, the largest, covers the inputs of each
        scales = [w.input_scale for w in weights if isinstance(w, F8) and w.input_scale is not None]
        return replace(joined, input_scale=torch.stack(scales).amax())
    return joined


def _concatenated(weights: Sequence[Weight], axes: dict[str, int]) -> Weight:
    return _joined(weights, {name: partial(torch.cat, dim=axis) for name, axis in axes.items()})


def _joined(weights: Sequence[Weight], how: Mapping[str, Callable[[list[Tensor]], Tensor]]) -> Weight:
    """The first weight with each tensor that `how` names joined with those of the others."""
    changes: dict[str, Any] = {}
    for name, join in how.items():
        parts: list[Any] = [getattr(w, name, None) for w in weights]
        if isinstance(parts[0], Tensor):
            # bytes are joined: not every device joins FP8
            raw = [p.view(torch.uint8) if p.dtype == FP8 else p for p in parts]
            changes[name] = join(raw).view(parts[0].dtype)
    joined: Weight = replace(cast(Any, weights[0]), **changes)
    return joined
