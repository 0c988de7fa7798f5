"""The vision encoder natively: a program over the patches of one image, and the vectors of the last images."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pagoda.arch import memory
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.backend.base import Limits, Progress
from pagoda.backend.cpu import library as native
from pagoda.backend.cpu.library import BufferShape, Dims, Native, Op, Picture
from pagoda.backend.cpu.program import ACTIVATIONS, FLOATS, Program
from pagoda.backend.vision import ROPE_BASE, Encoded, in_one_go, layout, scaling
from pagoda.errors import ModelError
from pagoda.formats import QUANTIZE_ON_LOAD
from pagoda.types import Float32, Image, Int32, PlannedImage
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import MadeTensor
from pagoda.weights.source import Tensor

BLOCK = 32
"""Values that share a scale in 8 bits: matrices are padded to whole blocks, so that they can be quantized."""

MERGED_ROWS = 128
"""Vectors that the last products make at a time."""

PIECE_ROWS = 512
"""Patches that go through a layer together, attention excepted, which needs all of them."""

PREFIX = "vision."

PATCHES, X, H, QKV, ATT, GATE_UP, MLP, MERGED, MERGED_UP, OUT = range(10)


class VisionProgram(Program):
    """A program whose rows are the patches of an image, in the order of its windows. It has no cache."""

    def __init__(
        self,
        lib: Native,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        progress: Progress | None,
        quantization: str | None = None,
    ) -> None:
        self._vision = vision_of(spec)
        check_vision(self._vision)
        super().__init__(lib, spec, tensors, progress, quantization)

    def _weights(self) -> None:
        v, biased = self._vision, self._vision.norm == "layer"
        self._ids = {"patch": self._matrix("patch")}
        norms = ["merge_norm"]
        products: dict[str, tuple[str, ...]] = {"merge_up": ("merge_up",), "merge_down": ("merge_down",)}
        for i in range(v.depth):
            p = f"layers.{i}."
            norms += [p + "attn_norm", p + "mlp_norm"]
            products |= {p + name: (p + name,) for name in ("qkv", "o", "down")}
            products[p + "gate_up"] = (p + "gate", p + "up") if v.gated else (p + "up",)
        for name in norms:
            self._ids[name] = self._vector(name)
            if biased:
                self._ids[name + "_bias"] = self._vector(name + "_bias")
        for done, (name, slots) in enumerate(products.items(), start=1):
            self._ids[name] = self._matrix(*slots)
            self._ids[name + "_bias"] = self._vector(*(slot + "_bias" for slot in slots))
            self._progress("image encoder", done / len(products))

    def finish(self, max_tokens: int, num_blocks: int = 0, kv_int8: bool = False) -> None:
        """Fix the program for images of `max_tokens` patches."""
        v = self._vision
        pairs = v.head_dim // 4  # of each of row and column
        inv_freq = np.tile(ROPE_BASE ** (-np.arange(pairs, dtype=np.float64) / pairs), 2)
        dims = Dims(
            0, v.heads, v.heads, v.head_dim, 1, max_tokens, MERGED_ROWS, 0, v.head_dim, 0, 1.0,
            inv_freq.ctypes.data, 0, 0, 0, 0, PIECE_ROWS, (0, pairs, pairs),
        )  # fmt: skip
        self._lib.program(dims, buffer_shapes(self._spec), self._operations(), self._spec.hidden_size)

    def _operations(self) -> list[Op]:
        self._ops = []
        self._emit(native.PATCHES, out=PATCHES, flags=native.PIECES)
        self._emit(native.MATMUL, in_=PATCHES, out=X, weight="patch", flags=native.PIECES)
        for i in range(self._vision.depth):
            self._vision_layer(i)
        rows = native.LOGIT_ROWS
        self._piece_norm("merge_norm", ATT)
        self._emit(native.GATHER, in_=ATT, out=MERGED, flags=rows)
        self._product("merge_up", MERGED, MERGED_UP, rows)
        self._emit(native.GELU, in_=MERGED_UP, out=MERGED_UP, flags=rows)
        self._product("merge_down", MERGED_UP, OUT, rows)
        self._emit(native.HIDDEN, in_=OUT, flags=rows)
        self._quantize_inputs()
        return self._ops

    def _vision_layer(self, i: int) -> None:
        v, p, pieces = self._vision, f"layers.{i}.", native.PIECES
        self._piece_norm(p + "attn_norm", H)
        self._product(p + "qkv", H, QKV, pieces)
        self._emit(native.ROPE, in_=QKV, flags=pieces)
        whole = native.FRAMES if v.sees_all(i) else 0
        self._emit(native.ATTEND_ALL, in_=QKV, out=ATT, f=v.head_dim**-0.5, flags=whole)
        self._product(p + "o", ATT, X, native.ADD | pieces)
        self._piece_norm(p + "mlp_norm", H)
        self._product(p + "gate_up", H, GATE_UP, pieces)
        self._emit(ACTIVATIONS[v.activation, v.gated], in_=GATE_UP, out=MLP, flags=pieces)
        self._product(p + "down", MLP, X, native.ADD | pieces)

    def _piece_norm(self, name: str, out: int) -> None:
        kind = native.LAYER_NORM if self._vision.norm == "layer" else native.NORM
        bias = name + "_bias"
        self._emit(kind, in_=X, out=out, vector=name, vector2=bias, f=self._vision.norm_eps, flags=native.PIECES)

    def _product(self, name: str, in_: int, out: int, flags: int) -> None:
        self._emit(native.MATMUL, in_=in_, out=out, weight=name, vector=name + "_bias", flags=flags)


class VisionEncoder:
    """Gives a step the vectors of its images, and keeps those of the last ones."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        progress: Progress | None,
        threads: int,
        limits: Limits,
    ) -> None:
        self._vision, self._width = vision_of(spec), spec.hidden_size
        self._encoded: Encoded[Float32] = Encoded(memory.encoded_bytes(spec, limits.max_model_len), self.begin)
        self._lib = Native(threads)
        try:
            self._program = VisionProgram(self._lib, spec, tensors, progress, vision_quantization(limits.quantization))
            self._most_patches = memory.most_patches(self._vision, limits.max_model_len)
            self._program.finish(self._most_patches)
        except BaseException:
            self._lib.close()
            raise

    @property
    def weight_bytes(self) -> int:
        return self._lib.weight_bytes

    def rows(self, images: Sequence[PlannedImage], tokens: int) -> tuple[Float32, Int32]:
        """The vectors of a step, and for each of its tokens the one that it takes, or -1."""
        parts, vector_of, used = [], np.full(tokens, -1, np.int32), 0
        for part in images:
            vectors = self._encoded.vectors(part.image)
            parts.append(vectors[part.first : part.first + part.count])
            vector_of[part.row : part.row + part.count] = used + np.arange(part.count)
            used += part.count
        return np.concatenate(parts), vector_of

    def ready(self, image: Image, most_s: float) -> bool:
        return self._encoded.ready(image, most_s)

    def begin(self, image: Image) -> Callable[[float], Float32 | None]:
        """An image alone, so that its vectors depend on nothing else: [tokens, hidden size of the model]."""
        v, place = self._vision, layout(image.grid, self._vision)
        patches = place.places.shape[1]
        if patches > self._most_patches:
            self._most_patches = patches
            self._program.finish(patches)
        first = (np.argsort(place.order) * v.merge_size**2).astype(np.int32)
        out = np.empty((len(first), self._width), np.float32)
        pixels = np.frombuffer(image.pixels, np.uint8)
        self._lib.begin(_picture(image, v), pixels, place.places, place.windows, place.frames, first, out)
        return lambda most_s: out if self._lib.go_on(most_s) else None

    def encode(self, image: Image) -> Float32:
        """The same in one go."""
        self._encoded.abandon()
        return in_one_go(self.begin(image))

    def close(self) -> None:
        self._encoded.clear()
        self._lib.close()


def _picture(image: Image, vision: Vision) -> Picture:
    height, width = (side * vision.patch_size for side in image.grid[1:])
    frames = len(image.pixels) // (height * width * 3)
    mean, spread = scaling(vision)
    three = ctypes.c_float * 3
    size, together = vision.patch_size, vision.temporal_patch_size
    return Picture(None, frames, height, width, size, together, three(*mean.tolist()), three(*spread.tolist()))


def vision_of(spec: ModelSpec) -> Vision:
    if spec.vision is None:
        raise ValueError("this model has no vision encoder")
    return spec.vision


def vision_quantization(quantization: str | None) -> str | None:
    """Encoders are small beside what they feed, and suffer from 4 bits: int4 means 8 for them."""
    return "int8" if quantization in QUANTIZE_ON_LOAD else quantization


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the text model; and those of the encoder, without their prefix and padded to whole blocks."""
    text = {slot: tensor for slot, tensor in tensors.items() if not slot.startswith(PREFIX)}
    seen = {slot.removeprefix(PREFIX): tensor for slot, tensor in tensors.items() if slot.startswith(PREFIX)}
    return text, {slot: _padded(slot, tensor) for slot, tensor in seen.items()}


def _padded(slot: str, tensor: Tensor) -> Tensor:
    """With zeros behind, which change nothing, where the size of a patch or of the MLP is no multiple of BLOCK."""
    axis = {"gate": 0, "up": 0, "gate_bias": 0, "up_bias": 0, "down": 1, "patch": 1}.get(slot.rpartition(".")[2])
    if axis is None or tensor.shape[axis] % BLOCK == 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] += -shape[axis] % BLOCK
    kind = tensor.type if tensor.type in FLOATS else "F32"
    return MadeTensor(tensor.name, tuple(shape), kind, partial(_pad, tensor, tuple(shape)), tensor)


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    values: npt.NDArray[Any]
    if tensor.type in FLOATS:
        values = tensor.data.view(np.uint32 if tensor.type == "F32" else np.uint16).reshape(tensor.shape)
    else:
        values = dequantize(tensor)
    out = np.zeros(shape, values.dtype)
    out[tuple(slice(size) for size in tensor.shape)] = values
    return out.view(np.uint8).ravel()


def buffer_shapes(spec: ModelSpec) -> Sequence[BufferShape]:
    """Width of each buffer, in the order of the constants."""
    v = vision_of(spec)
    patch, inner = (-(-size // BLOCK) * BLOCK for size in (v.patch_values, v.intermediate_size))
    wide, gates = v.hidden_size, 2 if v.gated else 1
    all_rows, piece, merged = native.TOKENS, native.PIECE, native.LOGITS
    return [
        BufferShape(patch, piece), BufferShape(wide, all_rows), BufferShape(wide, piece),
        BufferShape(3 * wide, all_rows), BufferShape(wide, all_rows), BufferShape(gates * inner, piece),
        BufferShape(inner, piece), BufferShape(v.merged_size, merged), BufferShape(v.merged_size, merged),
        BufferShape(spec.hidden_size, merged),
    ]  # fmt: skip


def check_vision(vision: Vision) -> None:
    """ModelError where the kernels lack something that the encoder needs."""
    if vision.head_dim % 16 or vision.head_dim > 512:
        raise ModelError(
            f"the CPU backend needs an image encoder whose head size is a multiple of 16, not {vision.head_dim}",
            remedy="Try --device reference",
        )
    if (vision.activation, vision.gated) not in ACTIVATIONS:
        gated = "with" if vision.gated else "without"
        raise ModelError(
            f"the CPU backend has no image encoder with {vision.activation} {gated} a gate",
            remedy="Try --device reference",
        )
