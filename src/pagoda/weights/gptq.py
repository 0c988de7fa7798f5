"""GPTQ checkpoints (the layout of AutoGPTQ and GPTQModel): 4- and 8-bit matrices, packed along the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import BLOCK, Bytes, Grouped, group_size, matrix_shape, part, unpack
from pagoda.weights.source import Tensor

# How much less than a zero point is stored for it.
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def gptq_tensors(path: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model, each `X.qweight` with its `qzeros`, `scales` and `g_idx` replaced by one `X.weight`."""
    bits, form = table.get("bits"), str(table.get("checkpoint_format") or "gptq")
    if bits not in (4, 8) or form not in _ZERO_OFFSETS or table.get("is_marlin_format"):
        raise ModelError(
            f"{path} holds GPTQ weights of {bits} bits in the format {form!r}",
            remedy="Take a GPTQ version with 4 or 8 bits in the format 'gptq' or 'gptq_v2', or a GGUF file",
        )
    out = dict(tensors)
    for name in [n for n in tensors if n.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        matrix = _matrix(stem, int(bits), table, _ZERO_OFFSETS[form], out)
        out[matrix.name] = matrix.tensor()
        # Old exporters gave every matrix a bias, of zeros where the model has none.
        bias = out.get(f"{stem}.bias")
        if bias is not None and not dequantize(bias).any():
            del out[bias.name]
    return out


def _matrix(stem: str, bits: int, table: Mapping[str, Any], offset: int, tensors: dict[str, Tensor]) -> Grouped:
    words, per_word = tensors[f"{stem}.qweight"], 32 // bits
    outputs, inputs = shape = matrix_shape(f"{stem}.qweight", words, per_word, 1)
    size = group_size(table, "group_size")
    groups = -(-inputs // size) if size > 0 else 1
    scales = part(tensors, f"{stem}.scales", "float", (groups, outputs))
    zeros = part(tensors, f"{stem}.qzeros", "I32", (groups, outputs // per_word))
    group_of = _groups(stem, inputs, size, groups, bool(table.get("desc_act")), tensors)
    for end in ("qweight", "scales", "qzeros", "g_idx"):
        tensors.pop(f"{stem}.{end}", None)
    read, read_zeros = GptqCodes(bits), partial(_zeros, bits=bits, offset=offset)
    return Grouped(f"{stem}.weight", shape, bits, group_of, scales, words, zeros, read, read_zeros)


def _groups(
    stem: str, inputs: int, size: int, groups: int, desc_act: bool, tensors: dict[str, Tensor]
) -> npt.NDArray[np.int32]:
    """The group of each input; where the checkpoint does not say, they follow each other."""
    stored = tensors.get(f"{stem}.g_idx")
    if stored is None or stored.shape == (0,):
        if desc_act:
            raise ModelError(f"the checkpoint lacks the tensor {stem}.g_idx, which desc_act needs")
        return (np.arange(inputs) // (size if size > 0 else inputs)).astype(np.int32)
    group_of = part(tensors, f"{stem}.g_idx", "I32", (inputs,)).data.view("<i4")
    if not ((group_of >= 0) & (group_of < groups)).all():
        raise ModelError(f"the tensor {stem}.g_idx names groups that are not there", remedy="Download the model again")
    return group_of


def _zeros(words: Tensor, bits: int, offset: int) -> Bytes:
    return unpack(words, bits) + np.uint8(offset) & np.uint8(2**bits - 1)


@dataclass(frozen=True, slots=True)
class GptqCodes:
    """The codes of words [in * bits / 32, out], as in `awq.AwqCodes`."""

    bits: int

    def __call__(self, words: Tensor) -> Bytes:
        bits = self.bits
        outputs, blocks = words.shape[1], words.shape[0] * (32 // bits) // BLOCK
        rows = words.data.reshape(blocks, bits, outputs, 4)  # `bits` words hold the 32 inputs of a block
        if bits == 8:
            return rows.transpose(2, 0, 1, 3).reshape(outputs, blocks, BLOCK)
        first, second = rows[:, :2], rows[:, 2:]
        out = np.empty((outputs, blocks, 2, 4, 2), np.uint8)
        out[..., 0] = (first & 15 | second << 4).transpose(2, 0, 1, 3)
        out[..., 1] = (first >> 4 | second & 0xF0).transpose(2, 0, 1, 3)
        return out.reshape(outputs, blocks, 16)
