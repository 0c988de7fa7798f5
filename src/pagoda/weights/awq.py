"""AWQ checkpoints (the GEMM layout of AutoAWQ): 4-bit matrices, packed along the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pagoda.errors import ModelError
from pagoda.weights.grouped import BLOCK, Bytes, Grouped, group_size, matrix_shape, part, unpack
from pagoda.weights.source import Tensor

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of a word that holds its i-th column
EVEN, ODD = (0, 4, 1, 5), (2, 6, 3, 7)  # columns in the low and in the high halves of a word's bytes


def awq_tensors(path: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model, each `X.qweight` with its `qzeros` and `scales` replaced by one `X.weight`."""
    bits, version = table.get("bits", table.get("w_bit", 4)), str(table.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise ModelError(
            f"{path} holds AWQ weights of {bits} bits in the layout {version!r}",
            remedy="Take an AWQ version with 4 bits in the layout 'gemm', or a GGUF file of the model",
        )
    size, out = group_size(table, "group_size", "q_group_size"), dict(tensors)
    for name in [n for n in tensors if n.endswith(".qweight")]:
        matrix = _matrix(name.removesuffix(".qweight"), size, out)
        out[matrix.name] = matrix.tensor()
    return out


def _matrix(stem: str, size: int, tensors: dict[str, Tensor]) -> Grouped:
    words = tensors[f"{stem}.qweight"]
    outputs, inputs = shape = matrix_shape(f"{stem}.qweight", words, 1, 8)
    size = size if size > 0 else inputs
    groups = -(-inputs // size)
    scales = part(tensors, f"{stem}.scales", "float", (groups, outputs))
    zeros = part(tensors, f"{stem}.qzeros", "I32", (groups, outputs // 8))
    for end in ("qweight", "scales", "qzeros"):
        del tensors[f"{stem}.{end}"]
    group_of = (np.arange(inputs) // size).astype(np.int32)
    return Grouped(
        f"{stem}.weight", shape, 4, group_of, scales, words, zeros, AwqCodes(), partial(unpack, bits=4, places=_PLACES)
    )


@dataclass(frozen=True, slots=True)
class AwqCodes:
    """The codes of words [in, out / 8], for backends that take them apart themselves; else as Grouped has them."""

    def __call__(self, words: Tensor) -> Bytes:
        inputs, columns = words.shape
        rows = words.data.reshape(inputs // BLOCK, 2, 16, columns, 4)
        first, second = rows[:, 0], rows[:, 1]
        out = np.empty((columns, 8, inputs // BLOCK, 16), np.uint8)
        out[:, list(EVEN)] = (first & 15 | second << 4).transpose(2, 3, 0, 1)
        out[:, list(ODD)] = (first >> 4 | second & 0xF0).transpose(2, 3, 0, 1)
        return out.reshape(columns * 8, inputs // BLOCK, 16)
