"""Matrices of AWQ and GPTQ as tensors of one storage type: whole numbers with a scale and a zero point by group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize, nbytes
from pagoda.weights.source import Tensor

BLOCK = 32
Bytes = npt.NDArray[np.uint8]


class MadeTensor(Tensor):
    """A tensor whose data is made each time it is read, and not kept: a model is converted one matrix at a time.

    `origin` is what it is made from, for backends that can take that as it is.
    """

    __slots__ = ("_make", "origin")
    _make: Callable[[], Bytes]
    origin: object

    def __init__(
        self, name: str, shape: tuple[int, ...], type: str, make: Callable[[], Bytes], origin: object = None
    ) -> None:
        parts = (("name", name), ("shape", shape), ("type", type), ("_make", make), ("origin", origin))
        for field, value in parts:
            object.__setattr__(self, field, value)

    @property
    def data(self) -> Bytes:
        return self._make()

    @property
    def nbytes(self) -> int:
        return nbytes(self.type, self.shape)


class OrderedTensor(MadeTensor):
    """A matrix in float32 that can also be had in few bits, once its inputs are put in an order.

    `packed` is the same matrix with input `order[k]` at place k, in the bits that it is stored in.
    """

    __slots__ = ("order", "packed")
    order: npt.NDArray[np.int32]
    packed: Tensor

    def __init__(self, floats: MadeTensor, order: npt.NDArray[np.int32], packed: Tensor) -> None:
        super().__init__(floats.name, floats.shape, floats.type, floats._make, floats.origin)
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "packed", packed)


@dataclass(frozen=True, slots=True)
class Grouped:
    """A matrix [out, in]: value = scale * (code - zero), the scale and zero those of the input's group.

    `words` and `zero_words` hold codes and zero points as stored, `read` and `read_zeros` take them out.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_of: npt.NDArray[np.int32]  # [in]
    scales: Tensor  # [groups, out]
    words: Tensor  # I32, of all codes
    zero_words: Tensor  # I32 [groups, ...]
    read: Callable[[Tensor], Bytes]
    read_zeros: Callable[[Tensor], Bytes]

    def codes(self) -> Bytes:
        """[out, in / 32, 16 or 32] bytes: of 4 bits, byte i holds inputs i (low half) and i + 16 of its block."""
        return self.read(self.words)

    def zeros(self) -> Bytes:
        """[groups, out]"""
        return self.read_zeros(self.zero_words)

    @property
    def even(self) -> bool:
        """All groups are of one size."""
        groups = self.scales.shape[0]
        return bool((np.bincount(self.group_of, minlength=groups) * groups == self.shape[1]).all())

    @property
    def in_order(self) -> bool:
        """Groups are runs of inputs."""
        return not bool((np.diff(self.group_of) < 0).any())

    def tensor(self) -> Tensor:
        """In blocks where each block of inputs has one group and an f16 scale, else in float32: always exact.

        Where groups are whole blocks once the inputs are sorted by them, it is an OrderedTensor.
        """
        if self._fills_blocks():
            return MadeTensor(self.name, self.shape, {4: "U4G", 8: "U8G"}[self.bits], partial(_blocks, self), self)
        floats = MadeTensor(self.name, self.shape, "F32", partial(_floats, self), self)
        order = np.argsort(self.group_of, kind="stable").astype(np.int32)
        sorted = replace(self, group_of=self.group_of[order], read=partial(_in_order, self, order))
        return OrderedTensor(floats, order, sorted.tensor()) if sorted._fills_blocks() else floats

    def _fills_blocks(self) -> bool:
        blocks = self.group_of.reshape(-1, BLOCK)
        return self.scales.type == "F16" and bool((blocks == blocks[:, :1]).all())


@dataclass(frozen=True, slots=True)
class Stacked:
    """Matrices of one shape and type as one tensor with a leading axis: the experts of a layer."""

    parts: tuple[Tensor, ...]

    def tensor(self, name: str) -> Tensor:
        first = self.parts[0]
        return MadeTensor(name, (len(self.parts), *first.shape), first.type, partial(_stacked, self.parts), self)


def part_of_stack(tensor: Tensor, index: int) -> Tensor:
    """One of the matrices of a tensor with a leading axis, without making the others."""
    if isinstance(tensor, MadeTensor) and isinstance(tensor.origin, Stacked):
        return tensor.origin.parts[index]
    each = nbytes(tensor.type, tensor.shape[1:])
    return Tensor(tensor.name, tensor.shape[1:], tensor.type, tensor.data[each * index : each * (index + 1)])


def _stacked(parts: tuple[Tensor, ...]) -> Bytes:
    return np.concatenate([part.data for part in parts])


def _blocks(m: Grouped) -> Bytes:
    group_of = m.group_of[::BLOCK]
    layout = np.dtype([("d", "<f2"), ("z", "u1"), ("q", "u1", BLOCK * m.bits // 8)])
    out = np.empty((m.shape[0], len(group_of)), layout)
    out["d"] = m.scales.data.view("<f2").reshape(m.scales.shape)[group_of].T
    out["z"] = m.zeros()[group_of].T
    out["q"] = m.codes()
    return out.reshape(-1).view(np.uint8)


def _each_code(m: Grouped) -> Bytes:
    """One byte for each, [out, in]."""
    codes = m.codes()
    return (np.stack((codes & 15, codes >> 4), axis=2) if m.bits == 4 else codes).reshape(m.shape)


def _in_order(m: Grouped, order: npt.NDArray[np.int32], words: Tensor) -> Bytes:
    codes: Bytes = _each_code(replace(m, words=words))[:, order].reshape(m.shape[0], -1, BLOCK)
    if m.bits == 8:
        return codes
    codes[..., :16] |= codes[..., 16:] << 4
    return np.ascontiguousarray(codes[..., :16])


def _floats(m: Grouped) -> Bytes:
    distance = _each_code(m).astype(np.float32) - m.zeros()[m.group_of].T
    return np.ascontiguousarray(dequantize(m.scales)[m.group_of].T * distance).reshape(-1).view(np.uint8)


def group_size(table: Mapping[str, Any], *keys: str) -> int:
    """Inputs of a group, by the first of these keys that is there; -1 for all of a row."""
    size = next((table[key] for key in keys if key in table), None)
    if not isinstance(size, int) or (size < 1 and size != -1):
        raise ModelError(f"quantization_config in config.json has the {keys[0]} {size!r}, which is no group size")
    return size


def part(tensors: dict[str, Tensor], name: str, type: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that a quantized matrix is made of, proven to be what it must be. `type` "float" is any float type."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ModelError(f"the checkpoint lacks the tensor {name}", remedy="Download the model again")
    kinds = ("F16", "BF16", "F32") if type == "float" else (type,)
    if tensor.type not in kinds or tensor.shape != shape:
        raise ModelError(
            f"the tensor {name} is {tensor.type} {list(tensor.shape)}, and {kinds[0]} {list(shape)} was expected by "
            "the bits and the group size in config.json"
        )
    return tensor


def unpack(words: Tensor, bits: int, places: tuple[int, ...] = ()) -> Bytes:
    """The numbers in rows of 32-bit words, lowest bits first; number `places[i]` of a word becomes its i-th."""
    packed = words.data.reshape(words.shape[0], -1)
    numbers = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1) if bits == 4 else packed
    if places:
        numbers = numbers.reshape(len(numbers), -1, len(places))[:, :, places]
    return np.ascontiguousarray(numbers).reshape(len(packed), -1)


def matrix_shape(name: str, tensor: Tensor, per_row: int, per_column: int) -> tuple[int, int]:
    """[out, in] of a packed matrix [in / per_row, out / per_column]."""
    if tensor.type != "I32" or len(tensor.shape) != 2:
        raise ModelError(f"the tensor {name} is {tensor.type} {list(tensor.shape)}, not a matrix of packed I32")
    inputs, outputs = tensor.shape[0] * per_row, tensor.shape[1] * per_column
    if inputs % BLOCK or not inputs or not outputs:
        raise ModelError(f"the matrix {name} has {inputs} inputs; quantized ones need a multiple of {BLOCK}")
    return outputs, inputs
