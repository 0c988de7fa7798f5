"""What checkpoints of models with state spaces call their tensors: fused products and convolutions cut."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from types import MappingProxyType

import numpy as np

from pagoda.arch.mamba import Mamba
from pagoda.arch.names.delta import computed
from pagoda.arch.spec import Layer, ModelSpec
from pagoda.weights.parts import OUTPUTS, part
from pagoda.weights.source import Tensor

FAMILIES = ("granitemoehybrid", "nemotron_h")

Named = Iterator[tuple[str, Tensor]]

_LAYER = re.compile(r"(model\.layers\.|blk\.)(\d+)\.(.+)")
_PARTS = MappingProxyType(
    {
        "mamba.in_proj.weight": "in",
        "mamba.conv1d.weight": "conv",
        "mamba.conv1d.bias": "conv_bias",
        "mamba.A_log": "log_rate",
        "mamba.D": "skip",
        "mamba.dt_bias": "dt",
        "mamba.norm.weight": "z_norm",
        "mamba.out_proj.weight": "o",
        "ssm_in.weight": "in",
        "ssm_conv1d.weight": "conv",
        "ssm_conv1d.bias": "conv_bias",
        "ssm_a": "negative_rate",
        "ssm_d": "skip",
        "ssm_dt.bias": "dt",
        "ssm_norm.weight": "z_norm",
        "ssm_out.weight": "o",
    }
)


def mamba_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model with one for each slot of its state spaces, and of Granite's shared experts."""
    return dict(found for name, tensor in tensors.items() for found in _each(spec, name, tensor))


def _each(spec: ModelSpec, name: str, tensor: Tensor) -> Named:
    found = _LAYER.fullmatch(name)
    if found is None or int(found[2]) >= len(spec.layers):
        yield name, tensor
        return
    prefix, layer, rest = f"{found[1]}{found[2]}.", spec.layers[int(found[2])], found[3]
    if isinstance(layer.delta, Mamba) and rest in _PARTS:
        yield from _of_mamba(f"{prefix}linear_attn.", _PARTS[rest], layer.delta, tensor)
    elif rest.startswith("shared_mlp.") and layer.mlp.experts is not None:
        yield from _shared(prefix, rest, layer, tensor)
    else:
        yield name, tensor


def _of_mamba(prefix: str, name: str, d: Mamba, tensor: Tensor) -> Named:
    """The slots that a tensor of a state space fills; one of a wrong shape is left for the complaint about it."""
    match name:
        case "in":
            sizes = {"z": d.value_width, "v": d.value_width, "k": d.key_width, "q": d.key_width, "decay": d.value_heads}
            yield from _cut(prefix, sizes, tensor, "")
        case "conv" | "conv_bias":
            if len(tensor.shape) == 3:
                tensor = replace(tensor, shape=(tensor.shape[0], tensor.shape[2]))
            yield from _cut(prefix, {"v": d.value_width, "k": d.key_width, "q": d.key_width}, tensor, f"_{name}")
        case "log_rate":
            yield f"{prefix}rate", computed(tensor, np.exp)
        case "negative_rate":
            yield f"{prefix}rate", computed(_flat(tensor), np.negative)
        case "skip" | "z_norm":
            yield prefix + name, _flat(tensor)
        case _:
            yield prefix + name, tensor


def _cut(prefix: str, sizes: Mapping[str, int], tensor: Tensor, suffix: str) -> Named:
    if tensor.shape[0] != sum(sizes.values()):
        yield prefix + next(iter(sizes)) + suffix, tensor
        return
    axis = OUTPUTS if len(tensor.shape) > 1 else -1
    for name, (first, last) in zip(sizes, pairwise(accumulate(sizes.values(), initial=0)), strict=True):
        yield prefix + name + suffix, part(tensor, axis, first, last)


def _flat(tensor: Tensor) -> Tensor:
    """GGUF has a row for each head, or for each group."""
    return replace(tensor, shape=(int(np.prod(tensor.shape)),))


def _shared(prefix: str, rest: str, layer: Layer, tensor: Tensor) -> Named:
    experts, own = layer.mlp.experts, f"{prefix}mlp.shared_expert."
    if rest == "shared_mlp.input_linear.weight" and experts is not None and tensor.shape[0] == 2 * experts.shared:
        yield f"{own}gate_proj.weight", part(tensor, OUTPUTS, 0, experts.shared)
        yield f"{own}up_proj.weight", part(tensor, OUTPUTS, experts.shared, 2 * experts.shared)
    else:
        yield f"{own}down_proj.weight" if rest == "shared_mlp.output_linear.weight" else prefix + rest, tensor
