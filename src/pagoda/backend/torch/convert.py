"""From a stored matrix to a weight on the device: in its own bits where the kernels have them, else in floats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagoda.backend.torch import gguf
from pagoda.backend.torch.join import stacked
from pagoda.backend.torch.packs import F8, FP8, FP8_MAX, I8, W4, W8, Dense, Weight, pack_w4
from pagoda.options.formats import INT4_GROUP, on_load_gpu
from pagoda.weights.awq import EVEN, ODD, AwqCodes
from pagoda.weights.fp8 import Scaled
from pagoda.weights.ggml import dequantize
from pagoda.weights.gptq import GptqCodes
from pagoda.weights.grouped import Grouped, MadeTensor, Stacked
from pagoda.weights.source import Tensor as Stored

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 32 << 20
_FITS = 4
_FIT_VALUES = 1 << 24
_MOST_ZERO = 1000  # of zero points, so that float16 says them well


@dataclass(frozen=True, slots=True)
class Target:
    """Where weights go and what they become. `fp8_inputs`: products of FP8 on both sides can run there."""

    device: torch.device
    dtype: torch.dtype
    quantization: str | None = None
    fp8_inputs: bool = True

    @property
    def scale_type(self) -> torch.dtype:
        """Scales and zero points of groups: at least as exact as what is computed with them."""
        return torch.float32 if self.dtype == torch.float32 else torch.float16


class Converter:
    """Sends stored tensors to the device, through a pinned buffer where that is a GPU. One for each thread."""

    def __init__(self, target: Target) -> None:
        self.target = target
        pinned = target.device.type == "cuda"
        self._staging = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) if pinned else None

    def send(self, data: npt.NDArray[np.uint8]) -> Tensor:
        """The bytes, flat, on the device."""
        flat = data.reshape(-1).view(np.uint8)
        out = torch.empty(flat.nbytes, dtype=torch.uint8, device=self.target.device)
        if self._staging is None:
            out.numpy()[:] = flat
            return out
        for first in range(0, flat.nbytes, _CHUNK_BYTES):
            part = flat[first : first + _CHUNK_BYTES]
            self._staging.numpy()[: part.nbytes] = part
            out[first : first + part.nbytes].copy_(self._staging[: part.nbytes], non_blocking=True)
            # of that GPU: a thread's own is the first one until it says another
            torch.cuda.current_stream(self.target.device).synchronize()
        return out

    def floats(self, tensor: Stored, dtype: torch.dtype) -> Tensor:
        """The values of any tensor. Quantized ones come row by row: a large table has no room in float32."""
        kind = tensor.type
        if kind in FLOATS:
            return self.send(tensor.data).view(FLOATS[kind]).reshape(tensor.shape).to(dtype)
        width = tensor.shape[-1]
        out = torch.empty(tensor.shape, dtype=dtype, device=self.target.device)
        rows, data = out.view(-1, width), tensor.data.reshape(math.prod(tensor.shape[:-1]), -1)
        step = max(1, _CHUNK_BYTES // (4 * width))
        for first in range(0, len(rows), step):
            part = data[first : first + step]
            values = dequantize(Stored(tensor.name, (len(part), width), kind, part.reshape(-1)))
            rows[first : first + step] = self.send(values.view(np.uint8)).view(torch.float32).view(values.shape)
        return out

    def weight(self, tensor: Stored, slot: str = "") -> Weight:
        """A matrix that a product takes; the slot matters to what is quantized on load."""
        origin = tensor.origin if isinstance(tensor, MadeTensor) else None
        if isinstance(origin, Stacked):
            return stacked([self.weight(part, slot) for part in origin.parts])
        if isinstance(origin, Grouped) and (packed := self._grouped(origin)) is not None:
            return packed
        if isinstance(origin, Scaled):
            return self._scaled(origin)
        if tensor.type in gguf.DECODERS or tensor.type == gguf.MXFP4:
            rows = self.send(tensor.data).reshape(*tensor.shape[:-1], -1)
            return gguf.weight(tensor.type, rows, self.target.scale_type)
        return self._quantized(self.floats(tensor, self.target.dtype), slot)

    def _grouped(self, m: Grouped) -> Weight | None:
        """None where the groups are of different sizes."""
        if not m.even:
            return None
        codes = self._codes(m)
        order = None
        if not m.in_order:
            order = torch.from_numpy(np.argsort(m.group_of, kind="stable")).to(self.target.device)
            codes = codes[:, order]
        kind = self.target.scale_type
        scales = self.floats(m.scales, kind)
        zeros = self.send(m.zeros()).reshape(scales.shape)
        if m.bits == 4:
            return pack_w4(codes, scales, zeros.to(kind), order, whole=True)
        centred = (zeros.to(torch.int16) - 128).to(kind)
        return W8((codes ^ 128).view(torch.int8), scales, centred if bool(centred.any()) else None, order)

    def _codes(self, m: Grouped) -> Tensor:
        """One byte for each, [out, in]: taken apart on the device, as the file is read faster than a CPU does that."""
        match m.read:
            case AwqCodes():
                packed = self._turned(m.words).view(torch.uint8).reshape(-1, m.shape[1], 4).transpose(1, 2).contiguous()
                columns = torch.empty(len(packed), 8, m.shape[1], dtype=torch.uint8, device=packed.device)
                columns[:, list(EVEN)], columns[:, list(ODD)] = packed & 15, packed >> 4
                return columns.reshape(m.shape)
            case GptqCodes():
                packed = self._turned(m.words).view(torch.uint8)
                return _nibbles(packed) if m.bits == 4 else packed
        blocks = self.send(m.codes()).reshape(m.shape[0], m.shape[1] // 32, -1)
        return (torch.cat((blocks & 15, blocks >> 4), dim=-1) if m.bits == 4 else blocks).reshape(m.shape)

    def _turned(self, words: Stored) -> Tensor:
        """int32 words [a, b] as [b, a]."""
        return self.send(words.data).view(torch.int32).reshape(words.shape).t().contiguous()

    def _scaled(self, m: Scaled) -> Weight:
        codes = self.send(m.codes.data).view(FP8).reshape(m.codes.shape)
        scales = self.floats(m.scales, torch.float32)
        scale = None if m.input_scale is None else self.floats(m.input_scale, torch.float32).reshape(())
        return F8(codes, scales, m.block, scale, self.target.fp8_inputs)

    def _quantized(self, values: Tensor, slot: str) -> Weight:
        match on_load_gpu(self.target.quantization, slot, values.shape[-1]):
            case "int8":
                return make_i8(values)
            case "int4":
                return make_w4(values, self.target.scale_type)
            case "w8":
                return make_w8(values, self.target.scale_type)
            case "fp8":
                return make_f8(values, self.target.fp8_inputs)
        return Dense(values)


def _nibbles(packed: Tensor) -> Tensor:
    """[..., n] bytes to [..., 2n] numbers: each low half before its high one."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def make_i8(values: Tensor) -> I8:
    """One scale for each output: the largest magnitude is 127."""
    exact = values.float()
    scales = exact.abs().amax(-1).clamp_min(1e-10) / 127
    return I8((exact / scales.unsqueeze(-1)).round().to(torch.int8), scales)


def make_w4(values: Tensor, kind: torch.dtype) -> W4:
    """Codes 0 to 15 of each group, and the scale and zero point that fit it best: from the least to the largest value
    first, then the least-squares line through the codes, again and again; the best of these is kept.
    """
    rows = torch.split(values.flatten(0, -2), max(1, _FIT_VALUES // values.shape[-1]))  # a fit takes ten times a matrix
    fitted = [_line(torch.unflatten(part.float(), -1, (-1, INT4_GROUP)), kind) for part in rows]
    codes, scales, zeros = (
        torch.unflatten(torch.cat(parts), 0, values.shape[:-1]) for parts in zip(*fitted, strict=True)
    )
    columns = [part.squeeze(-1).to(kind).transpose(-1, -2).contiguous() for part in (scales, zeros)]
    return pack_w4(codes.flatten(-2), *columns)


def _line(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of groups [..., GROUP]."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    least, scale = torch.full_like(low, torch.inf), (high - low) / 15
    found = (x, scale, low)
    for _ in range(1 + _FITS):
        # a group of one value is said by that value as the scale, times 1 - 0
        flat = scale.abs() * _MOST_ZERO <= low.abs()
        scale = torch.where(flat, torch.where(low == 0, 1.0, low), scale).to(kind).float()
        zero = torch.where(flat, torch.where(low == 0, 0.0, -1.0), -low / scale).to(kind).float()
        codes = torch.where(flat, 0.0, (x / scale + zero).round().clamp(0, 15))
        error = ((codes - zero) * scale - x).square().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        found = (
            torch.where(better, codes, found[0]),
            torch.where(better, scale, found[1]),
            torch.where(better, zero, found[2]),
        )
        middle, mean = codes.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
        spread = (codes - middle).square().sum(-1, keepdim=True)
        slope = ((codes - middle) * (x - mean)).sum(-1, keepdim=True) / spread
        scale = torch.where(spread > 0, slope, scale)
        low = torch.where(spread > 0, mean - slope * middle, low)
    codes, scale, zero = found
    return codes.to(torch.uint8), scale, zero


def make_w8(values: Tensor, kind: torch.dtype) -> W8:
    """Codes -127 to 127: the largest magnitude of each group is 127."""
    grouped = torch.unflatten(values.float(), -1, (-1, INT4_GROUP))
    scales = (grouped.abs().amax(-1, keepdim=True).clamp_min(1e-7) / 127).to(kind)
    codes = (grouped / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return W8(codes.flatten(-2), scales.squeeze(-1).transpose(-1, -2).contiguous())


def make_f8(values: Tensor, quantize_input: bool) -> F8:
    """One scale for each output: the largest magnitude is 448."""
    exact = values.float()
    scales = exact.abs().amax(-1, keepdim=True).clamp_min(1e-10) / FP8_MAX
    return F8((exact / scales).to(FP8), scales, quantize_input=quantize_input)
