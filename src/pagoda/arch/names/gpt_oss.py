"""What gpt-oss checkpoints call their tensors, and what other decoders call the same: gate and up apart, by expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from pagoda.errors import ModelError
from pagoda.weights.grouped import Bytes, MadeTensor, Stacked
from pagoda.weights.mxfp4 import Microscaled
from pagoda.weights.source import Tensor

_RENAMED = MappingProxyType(
    {
        ".self_attn.sinks": ".self_attn.sinks.weight",
        ".mlp.router.weight": ".mlp.gate.weight",
        ".mlp.router.bias": ".mlp.gate.bias",
        ".post_attention_norm.weight": ".ffn_norm.weight",  # of GGUF
    }
)
_GATE_UP, _DOWN, _BIAS = ".experts.gate_up_proj", ".experts.down_proj", "_bias"
_ITEMS = MappingProxyType({"F32": "u4", "F16": "u2", "BF16": "u2"})


def gpt_oss_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A gpt-oss's tensors under the spelling of other decoders; the experts' are one for all, with a `*`."""
    return dict(found for name, tensor in tensors.items() for found in _each(name, tensor))


def _each(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    stem, bias = name.removesuffix(_BIAS), name.endswith(_BIAS)
    end = "bias" if bias else "weight"
    if stem.endswith(_GATE_UP):
        for first, part in enumerate(("gate", "up")):
            own = f"{stem.removesuffix(_GATE_UP)}.experts.*.{part}_proj.{end}"
            yield own, _biases(tensor, 2, first) if bias else _stack(own, tensor, 2, first)
    elif stem.endswith(_DOWN):
        own = f"{stem.removesuffix(_DOWN)}.experts.*.down_proj.{end}"
        yield own, tensor if bias else _stack(own, tensor, 1, 0)
    else:
        old = next((old for old in _RENAMED if name.endswith(old)), None)
        yield (name if old is None else name.removesuffix(old) + _RENAMED[old]), tensor


def _stack(name: str, tensor: Tensor, step: int, first: int) -> Tensor:
    """Each `step`-th output of every expert. Floats are stored as [experts, in, out]."""
    if isinstance(tensor, MadeTensor) and isinstance(tensor.origin, Stacked):
        packed = [part.origin for part in tensor.origin.parts if isinstance(part, MadeTensor)]
        return Stacked(tuple(m.every(step, first) for m in packed if isinstance(m, Microscaled))).tensor(name)
    _check(tensor, 3)
    experts, inputs, outputs = tensor.shape
    shape = (len(range(first, outputs, step)), inputs)
    makers = (partial(_turned, tensor, expert, step, first) for expert in range(experts))
    return Stacked(tuple(MadeTensor(name, shape, tensor.type, make) for make in makers)).tensor(name)


def _turned(tensor: Tensor, expert: int, step: int, first: int) -> Bytes:
    values = tensor.data.view(_ITEMS[tensor.type]).reshape(tensor.shape)[expert, :, first::step]
    return np.ascontiguousarray(values.T).reshape(-1).view(np.uint8)


def _biases(tensor: Tensor, step: int, first: int) -> Tensor:
    _check(tensor, 2)
    values = tensor.data.view(_ITEMS[tensor.type]).reshape(tensor.shape)[:, first::step]
    return Tensor(tensor.name, values.shape, tensor.type, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _check(tensor: Tensor, axes: int) -> None:
    if tensor.type not in _ITEMS or len(tensor.shape) != axes:
        raise ModelError(
            f"the tensor {tensor.name} is {tensor.type} {list(tensor.shape)}: the experts of gpt-oss are read in "
            "floats and in MXFP4",
            remedy="Take the version in MXFP4, or a GGUF file of the model",
        )
