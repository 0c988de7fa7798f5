"""What the architectures with state spaces (Mamba-2) share: the fields of both formats to a layer's Mamba."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pagoda.arch.fields import Fields
from pagoda.arch.mamba import Mamba
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

DEFAULT_KERNEL = 4
_MOST_KERNEL = 16


def checked(d: Mamba, fields: Fields, heads: str) -> Mamba:
    """`heads`: the field that says how many there are."""
    if d.value_heads % d.groups:
        raise fields.error(heads, f"is {d.value_heads}; they cannot be shared evenly among {d.groups} groups")
    return d


def kernel(fields: Fields, name: str) -> int:
    return fields.integer(name, DEFAULT_KERNEL, least=2, most=_MOST_KERNEL)


def refuse_limits(fields: Fields, name: str = "time_step_limit") -> None:
    """Steps between limits other than none, 0 to infinity, which newer transformers write as a table."""
    said = fields.get(name)
    if said is None:
        return
    if isinstance(said, list | tuple) and len(said) == 2:
        least, most = (each.get("__float__") if isinstance(each, Mapping) else each for each in said)
        if least == 0 and most in (math.inf, "Infinity"):
            return
    raise fields.error(name, f"is {said!r}: limits of the steps of a state space are not supported")


def from_gguf(fields: Fields, tensors: Mapping[str, Tensor], eps: float) -> Mamba:
    heads = fields.integer("ssm.time_step_rank")
    return checked(
        Mamba(
            key_heads=fields.integer("ssm.group_count", 1),
            value_heads=heads,
            key_dim=fields.integer("ssm.state_size"),
            value_dim=fields.integer("ssm.inner_size") // heads,
            kernel=kernel(fields, "ssm.conv_kernel"),
            eps=eps,
            conv_bias=any(name.endswith(".ssm_conv1d.bias") for name in tensors),
        ),
        fields,
        "ssm.time_step_rank",
    )


def with_heads_of_attention(metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The metadata with one number of KV heads: of the layers that have no attention GGUF says 0."""
    said = metadata.get(f"{prefix}attention.head_count_kv")
    heads = np.unique(np.atleast_1d(0 if said is None else said))
    return {**metadata, f"{prefix}attention.head_count_kv": heads[heads > 0].tolist()}


def with_state_spaces(spec: ModelSpec, d: Mamba, where: Sequence[bool]) -> ModelSpec:
    """The spec with state spaces in the layers that `where` says."""
    chosen = zip(spec.layers, where, strict=True)
    return replace(spec, layers=tuple(replace(layer, delta=d if has else None) for layer, has in chosen))
