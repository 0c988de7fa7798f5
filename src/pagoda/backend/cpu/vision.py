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
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.library import Native
from pagoda.backend.cpu.panels import FLOATS, kind_of_cache
from pagoda.backend.cpu.program import ACTIVATIONS, Program
from pagoda.backend.cpu.records import BufferShape, Dims, Op, Picture
from pagoda.backend.vision import (
    MID_EPS,
    Encoded,
    cubic_positions,
    frequencies,
    in_one_go,
    layout,
    scaling,
    vectors_taken,
)
from pagoda.errors import ModelError
from pagoda.options.formats import QUANTIZE_ON_LOAD
from pagoda.types import Float32, Image, Int32, PlannedImage
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import MadeTensor
from pagoda.weights.source import Tensor

HEAD_BLOCK = 16
BLOCK = 32
"""Values that share a scale in 8 bits: matrices are padded to whole blocks, so that they can be quantized."""

MERGED_ROWS = 128
"""Vectors that the last products make at a time."""

PIECE_ROWS = 512
"""Patches that go through a layer together, attention excepted, which needs all of them."""

PREFIX = "vision."

PATCHES, X, H, QKV, ATT, GATE_UP, MLP, JOINED, MERGED, ONE, MERGED_UP, OUT, MERGED_MLP = range(13)


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
        v = self._vision
        self.ids = {"patch": self._matrix("patch")}
        mergers = ["", *(f"deep.{k}." for k in range(len(v.deep_layers)))]
        vectors = ["patch_bias", "first_norm", "mean_norm", "mid_norm", *(p + "merge_norm" for p in mergers)]
        vectors += ["positions"] if v.grid == "linear" else []
        ends = ["merge_in", "merge_down", *(["merge_mid"] if v.merge == "gated" else ["merge_up"])]
        products: dict[str, tuple[str, ...]] = {p + n: (p + n,) for p in mergers for n in ends}
        products |= {"merge_gate_up": ("merge_gate", "merge_up")} if v.merge == "gated" else {}
        for i in range(v.depth):
            p = f"layers.{i}."
            vectors += [p + name for name in ("attn_norm", "mlp_norm", "attn_scale", "mlp_scale")]
            products |= {p + name: (p + name,) for name in ("qkv", "o", "down")}
            products[p + "gate_up"] = (p + "gate", p + "up") if v.gated else (p + "up",)
        products = {name: slots for name, slots in products.items() if slots[0] in self._tensors}
        for name in (each for vector in vectors for each in (vector, vector + "_bias")):
            if name in self._tensors:
                self.ids[name] = self._vector(name)
        for done, (name, slots) in enumerate(products.items(), start=1):
            self.ids[name] = self._matrix(*slots)
            if slots[0] + "_bias" in self._tensors:
                self.ids[name + "_bias"] = self._vector(*(slot + "_bias" for slot in slots))
            self._progress("image encoder", done / len(products))

    def finish(self, max_tokens: int, num_blocks: int = 0, kv: int = 0, states: int = 0) -> None:
        """Fix the program for images of `max_tokens` patches."""
        v = self._vision
        pairs = v.head_dim // 4  # of each of row and column
        inv_freq = frequencies(v)
        axes = np.repeat(np.array([1, 2], np.int32), pairs)
        dims = Dims(
            0, v.heads, v.heads, padded_head(v), 1, max_tokens, MERGED_ROWS, 0, v.head_dim, 0, 1.0,
            inv_freq.ctypes.data, kind_of_cache("auto", self._tensors), piece_rows=PIECE_ROWS,
            rope_axes=axes.ctypes.data,
        )  # fmt: skip
        self._lib.program(dims, buffer_shapes(self._spec), self._operations(), self._spec.hidden_size)

    def _operations(self) -> list[Op]:
        self._ops = []
        self._emit(native.PATCHES, out=PATCHES, flags=native.PIECES)
        v = self._vision
        self._emit(native.MATMUL, in_=PATCHES, out=X, weight="patch", vector="patch_bias", flags=native.PIECES)
        if v.grid_side and v.grid == "linear":
            self._emit(native.GRID, out=X, vector="positions", layer=v.grid_side, flags=native.PIECES)
        if v.first_norm:
            self._vision_norm("first_norm", X, X, native.PIECES)
        if v.grid == "cubic":
            self._emit(native.ADD_VECTORS, out=X, flags=native.PIECES)
        for i in range(v.depth):
            self._vision_layer(i)
            if i in v.deep_layers:
                place = v.deep_layers.index(i)
                self._merge(f"deep.{place}.", place + 1, parts=1)
        self._merge("", 0, parts=1 if v.merge_norm == "joined" else v.merge_size**2)
        return self._ops

    def _merge(self, p: str, place: int, parts: int) -> None:
        """Make vector `place` of each token; a norm is of each of the `parts` that are joined, or of them all."""
        v, rows, joined = self._vision, native.LOGIT_ROWS, MERGED
        eps = v.norm_eps if v.merge_eps is None else v.merge_eps
        self._emit(native.GATHER, in_=X, out=JOINED if v.merge_norm else MERGED, flags=rows)
        if v.merge_norm:
            self._vision_norm(p + "merge_norm", JOINED, MERGED, rows, parts, eps)
        if v.merge == "averaged":
            joined = ONE
            self._emit(native.MEAN, in_=MERGED, out=ONE, layer=parts, flags=rows)
            self._emit(native.NORM, in_=ONE, out=ONE, vector=p + "mean_norm", f=eps, flags=rows)
        if v.merge == "reduced":
            joined = ONE
            self._product(p + "merge_in", MERGED, ONE, rows)
        if v.merge in ("joined", "narrow", "reduced"):
            self._product(p + "merge_up", joined, MERGED_UP, rows)
            self._emit(native.GELU, in_=MERGED_UP, out=MERGED_UP, flags=rows)
            joined = MERGED_UP
        if v.merge == "gated":
            joined = self._merge_gated(rows)
        self._product(p + "merge_down", joined, OUT, rows)
        self._emit(native.HIDDEN, in_=OUT, layer=place, flags=rows)

    def _merge_gated(self, rows: int) -> int:
        """What stands before the last product of a gated merge; where it is."""
        self._product("merge_in", MERGED, ONE, rows)
        self._product("merge_mid", ONE, OUT, rows)
        self._emit(
            native.LAYER_NORM, in_=OUT, out=ONE, vector="mid_norm", vector2="mid_norm_bias", f=MID_EPS, flags=rows
        )
        self._emit(native.GELU, in_=ONE, out=ONE, flags=rows)
        self._product("merge_gate_up", ONE, MERGED_UP, rows)
        self._emit(native.SILU, in_=MERGED_UP, out=MERGED_MLP, flags=rows)
        return MERGED_MLP

    def _vision_layer(self, i: int) -> None:
        v, p, pieces = self._vision, f"layers.{i}.", native.PIECES
        self._vision_norm(p + "attn_norm", X, H, pieces)
        self._product(p + "qkv", H, QKV, pieces)
        if v.rope:
            self._emit(native.ROPE, in_=QKV, flags=pieces)
        whole = native.FRAMES if v.sees_all(i) else 0
        self._emit(native.ATTEND_ALL, in_=QKV, out=ATT, f=v.head_dim**-0.5, flags=whole)
        self._add_product(p + "o", ATT, p + "attn_scale")
        self._vision_norm(p + "mlp_norm", X, H, pieces)
        self._product(p + "gate_up", H, GATE_UP, pieces)
        self._emit(ACTIVATIONS[v.activation, v.gated], in_=GATE_UP, out=MLP, flags=pieces)
        self._add_product(p + "down", MLP, p + "mlp_scale")

    def _add_product(self, name: str, in_: int, scale: str) -> None:
        """To each patch a product, scaled where there is a vector for that."""
        if scale not in self.ids:
            return self._product(name, in_, X, native.ADD | native.PIECES)
        self._product(name, in_, H, native.PIECES)
        self._emit(native.ADD_SCALED, in_=H, out=X, vector=scale, flags=native.PIECES)

    def _vision_norm(self, name: str, in_: int, out: int, flags: int, parts: int = 1, eps: float | None = None) -> None:
        kind = native.LAYER_NORM if self._vision.norm == "layer" else native.NORM
        f = self._vision.norm_eps if eps is None else eps
        self._emit(kind, in_=in_, out=out, vector=name, vector2=name + "_bias", f=f, flags=flags, layer=parts)

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
        self._vision = vision_of(spec)
        self._width = spec.hidden_size * self._vision.vectors
        wide = self._vision.hidden_size
        cubic = self._vision.grid == "cubic"
        self._positions = dequantize(tensors["positions"]).reshape(-1, wide).copy() if cubic else None
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
            rows, which = vectors_taken(part, self._vision)
            parts.append(self._encoded.vectors(part.image)[which])
            vector_of[rows] = used + np.arange(len(rows))
            used += len(rows)
        return np.concatenate(parts), vector_of

    def ready(self, image: Image, most_s: float) -> bool:
        return self._encoded.ready(image, most_s)

    def begin(self, image: Image) -> Callable[[float], Float32 | None]:
        """An image alone, so that its vectors depend on nothing else: those of a token [tokens, ...] side by side."""
        v, place = self._vision, layout(image.grid, self._vision)
        patches = place.places.shape[1]
        if patches > self._most_patches:
            self._most_patches = patches
            self._program.finish(patches)
        first = (np.argsort(place.order) * v.merge_size**2).astype(np.int32)
        out = np.empty((len(first), self._width), np.float32)
        pixels = np.frombuffer(image.pixels, np.uint8)
        at = None if self._positions is None else cubic_positions(self._positions, place, image.grid)
        self._lib.begin(_picture(image, v), pixels, place.places, place.windows, place.frames, first, out, at)
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


def split_tensors(tensors: Mapping[str, Tensor], vision: Vision | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the text model; and those of the encoder, without their prefix and padded to whole blocks."""
    text = {slot: tensor for slot, tensor in tensors.items() if not slot.startswith(PREFIX)}
    seen = {slot.removeprefix(PREFIX): tensor for slot, tensor in tensors.items() if slot.startswith(PREFIX)}
    return text, {slot: _padded(slot, tensor, vision) for slot, tensor in seen.items()}


def padded_head(vision: Vision) -> int:
    """The head size that the kernels take."""
    return -(-vision.head_dim // HEAD_BLOCK) * HEAD_BLOCK


def _padded(slot: str, tensor: Tensor, vision: Vision | None) -> Tensor:
    """With zeros behind, which change nothing, where a head, a patch or the inside of the MLP is no whole blocks."""
    name = slot.rpartition(".")[2]
    axis = {"gate": 0, "up": 0, "gate_bias": 0, "up_bias": 0, "qkv": 0, "qkv_bias": 0, "down": 1, "patch": 1, "o": 1}
    if vision is None or name not in axis:
        return tensor
    place, size, parts = axis[name], tensor.shape[axis[name]], 1
    whole = -(-size // BLOCK) * BLOCK
    if name in ("qkv", "qkv_bias", "o"):
        parts = size // vision.head_dim  # heads, each of which is padded
        whole = parts * padded_head(vision)
    if whole == size:
        return tensor
    shape = (*tensor.shape[:place], whole, *tensor.shape[place + 1 :])
    kind = tensor.type if tensor.type in FLOATS else "F32"
    return MadeTensor(tensor.name, shape, kind, partial(_pad, tensor, shape, place, parts), tensor)


def _pad(tensor: Tensor, shape: tuple[int, ...], axis: int, parts: int) -> npt.NDArray[np.uint8]:
    """Each of the `parts` of an axis with zeros behind."""
    values: npt.NDArray[Any]
    if tensor.type in FLOATS:
        values = tensor.data.view(np.uint32 if tensor.type == "F32" else np.uint16)
    else:
        values = dequantize(tensor)
    before = (*shape[:axis], parts)
    rest = shape[axis + 1 :]
    out = np.zeros((*before, shape[axis] // parts, *rest), values.dtype)
    each = tensor.shape[axis] // parts
    out[(slice(None),) * len(before) + (slice(each),)] = values.reshape(*before, each, *rest)
    return out.view(np.uint8).ravel()


def buffer_shapes(spec: ModelSpec) -> Sequence[BufferShape]:
    """Width of each buffer, in the order of the constants."""
    v = vision_of(spec)
    patch, inner = (-(-size // BLOCK) * BLOCK for size in (v.patch_values, v.intermediate_size))
    wide, heads, gates = v.hidden_size, v.heads * padded_head(v), 2 if v.gated else 1
    hidden = spec.hidden_size
    up = {"joined": v.merged_size, "narrow": hidden, "reduced": hidden, "gated": 2 * v.merge_width}.get(v.merge, 0)
    one = {"reduced": wide, "averaged": wide, "gated": hidden}.get(v.merge, 0)
    all_rows, piece, merged = native.TOKENS, native.PIECE, native.LOGITS
    return [
        BufferShape(patch, piece), BufferShape(wide, all_rows), BufferShape(wide, piece),
        BufferShape(3 * heads, all_rows), BufferShape(heads, all_rows), BufferShape(gates * inner, piece),
        BufferShape(inner, piece), *[BufferShape(v.merged_size, merged)] * 2, BufferShape(one, merged),
        BufferShape(up, merged), BufferShape(hidden, merged), BufferShape(v.merge_width, merged),
    ]  # fmt: skip


def check_vision(vision: Vision) -> None:
    """ModelError where the kernels lack something that the encoder needs."""
    if vision.head_dim % 4 or vision.head_dim > 512 or vision.heads * padded_head(vision) % BLOCK:
        raise ModelError(
            f"the CPU backend has no image encoder with {vision.heads} heads of {vision.head_dim} values",
            remedy="Try --device reference",
        )
    if (vision.activation, vision.gated) not in ACTIVATIONS:
        gated = "with" if vision.gated else "without"
        raise ModelError(
            f"the CPU backend has no image encoder with {vision.activation} {gated} a gate",
            remedy="Try --device reference",
        )
