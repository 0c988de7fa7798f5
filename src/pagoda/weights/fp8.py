"""FP8 checkpoints: e4m3 matrices with a scale for the whole, for each output or for each block of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import Bytes, MadeTensor, Stacked, part_of_stack
from pagoda.weights.source import Tensor

# names of a matrix's scales, by who wrote the checkpoint; the first two are factors, the third is one too
_SCALES = ("weight_scale_inv", "weight_scale", "scale_weight")
_INPUT_SCALES = ("input_scale", "scale_input", "activation_scale")
_EXPERTS_SCALES = ("scale_inv",)
_CURE = "Take a version in FP8 e4m3 (per tensor, per channel or in blocks), in floats, or a GGUF file of the model"


@dataclass(frozen=True, slots=True)
class Scaled:
    """A matrix [out, in]: value = code * scale. `scales` is [1, 1], [out, 1] or [out blocks, in blocks].

    `input_scale`: one number, where inputs were measured when the checkpoint was made.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int] | None
    input_scale: Tensor | None

    def tensor(self) -> Tensor:
        """For backends without FP8: floats of 16 bits, which keep four more bits than the codes have."""
        return MadeTensor(self.codes.name, self.codes.shape, "BF16", partial(_floats, self), self)


def fp8_tensors(path: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model, each FP8 `X.weight` and its scales replaced by one `X.weight` of values.

    The experts of a layer may be one tensor `X`, whose scales are `X_scale_inv` and `X_activation_scale`.
    """
    block = _block(path, table)
    out = dict(tensors)
    for name in [n for n, t in tensors.items() if t.type == "F8_E4M3"]:
        codes, experts = tensors[name], len(tensors[name].shape) == 3
        stem = f"{name}_" if experts else f"{name.removesuffix('.weight')}."
        scales = _taken(out, stem, _EXPERTS_SCALES if experts else _SCALES)
        if scales is None:
            raise ModelError(f"the checkpoint lacks the scales of the FP8 tensor {name}", remedy="Download it again")
        input_scale = _taken(out, stem, _INPUT_SCALES)
        if experts:
            out[name] = _experts(codes, scales, block, input_scale)
        else:
            out[name] = Scaled(codes, _shaped(codes, scales, block), block, input_scale).tensor()
    # scales of the cache: keys and values are kept as they are
    return {n: t for n, t in out.items() if not n.endswith((".k_scale", ".v_scale"))}


def _block(path: str, table: Mapping[str, Any]) -> tuple[int, int] | None:
    """[out, in] of the blocks that share a scale; ModelError for what is not FP8."""
    size: Any
    if table.get("quant_method") == "compressed-tensors":
        schemes = [_table(_table(group).get("weights")) for group in _table(table.get("config_groups")).values()]
        if not schemes or any((s.get("type"), s.get("num_bits")) != ("float", 8) for s in schemes):
            raise ModelError(f"{path} holds compressed-tensors weights that are not FP8", remedy=_CURE)
        size = schemes[0].get("block_structure")
    else:
        if (table.get("fmt") or "e4m3") != "e4m3":
            raise ModelError(f"{path} holds FP8 weights in the format {table['fmt']!r}", remedy=_CURE)
        size = table.get("weight_block_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise ModelError(f"quantization_config in config.json has blocks of {size!r}, which is no size", remedy=_CURE)
    return size[0], size[1]


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _taken(tensors: dict[str, Tensor], stem: str, names: tuple[str, ...]) -> Tensor | None:
    found = [tensors.pop(stem + name) for name in names if stem + name in tensors]
    return found[0] if found else None


def _experts(codes: Tensor, scales: Tensor, block: tuple[int, int] | None, input_scale: Tensor | None) -> Tensor:
    """The matrices of a layer's experts, stored as one tensor."""
    count = codes.shape[0]
    parts = []
    for i in range(count):
        one, of_inputs = part_of_stack(codes, i), None if input_scale is None else _of_one(input_scale, i, count)
        parts.append(Scaled(one, _shaped(one, _of_one(scales, i, count), block), block, of_inputs).tensor())
    return Stacked(tuple(parts)).tensor(codes.name)


def _of_one(scales: Tensor, index: int, count: int) -> Tensor:
    """What is one expert's, where each has its own."""
    return part_of_stack(scales, index) if scales.shape[:1] == (count,) else scales


def _shaped(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The scales with two axes, proven to be those of the matrix."""
    if len(codes.shape) != 2 or scales.type not in ("F32", "BF16", "F16"):
        raise ModelError(f"the tensor {codes.name} is no FP8 matrix with float scales", remedy=_CURE)
    rows, columns = codes.shape
    count = int(np.prod(scales.shape))
    if block is not None:
        shape = (-(-rows // block[0]), -(-columns // block[1]))
    else:
        shape = (1, 1) if count == 1 else (rows, 1)
    if block is None and count == 2 < rows and rows % 2 == 0:  # gate and up are one matrix
        halves = scales.data.reshape(2, -1).repeat(rows // 2, axis=0).reshape(-1)
        return Tensor(scales.name, shape, scales.type, halves)
    if count != shape[0] * shape[1]:
        raise ModelError(f"the scales {scales.name} are {list(scales.shape)}, and {list(shape)} was expected")
    return Tensor(scales.name, shape, scales.type, scales.data)


def e4m3_values() -> npt.NDArray[np.float32]:
    """The value of each of the 256 codes: sign, 4 bits of exponent (bias 7), 3 of fraction; no infinities."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    values = np.where(codes >= 128, -magnitude, magnitude)
    values[codes & 127 == 127] = np.nan
    return values.astype(np.float32)


def values(m: Scaled) -> npt.NDArray[np.float32]:
    """[out, in] in float32."""
    rows, columns = m.codes.shape
    scales = dequantize(m.scales)
    if m.block is not None:
        scales = scales.repeat(m.block[0], axis=0)[:rows].repeat(m.block[1], axis=1)[:, :columns]
    return np.asarray(e4m3_values()[m.codes.data].reshape(rows, columns) * scales, np.float32)


def _floats(m: Scaled) -> Bytes:
    """bfloat16, rounded to the nearest even."""
    bits = values(m).view(np.uint32)
    rounded = (bits + (bits >> 16 & 1) + 0x7FFF) >> 16
    return np.ascontiguousarray(rounded.astype(np.uint16)).reshape(-1).view(np.uint8)
