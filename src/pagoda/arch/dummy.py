"""A checkpoint of random weights in the shapes and the storage that a config.json names: speed without a download."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagoda.arch.names.bind import slot_name
from pagoda.arch.registry import load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.options.formats import EXACT
from pagoda.options.tasks import Task
from pagoda.weights.files import Checkpoint
from pagoda.weights.ggml import BLOCKS, nbytes
from pagoda.weights.grouped import Bytes, MadeTensor, group_size
from pagoda.weights.open import open_source, unpacked
from pagoda.weights.quantization import method_of
from pagoda.weights.source import Tensor, TensorSource

_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NUMBERS = 262139
"""Random numbers that all tensors share, each from a place of its own. A prime: no two rows of a matrix are alike."""
_SPREAD_OF_E2M1 = 2.9  # of 4-bit floats whose codes are evenly spread
_STEP_OF_16, _STEP_OF_256 = 0.2, 0.0135  # scales with which evenly spread codes vary by 1


def open_model(
    path: str, load_format: str, task: Task = "auto", spec: ModelSpec | None = None, mmproj: str | None = None
) -> TensorSource:
    """The checkpoint at a path, or with the format `dummy` one of random weights for the config.json there."""
    return open_dummy(path, task, spec) if load_format == "dummy" else open_source(path, mmproj)


def open_dummy(path: str, task: Task = "auto", spec: ModelSpec | None = None) -> Checkpoint:
    """Reads config.json alone, and not even its sizes where the spec is known."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(
            f"cannot read {file}: {error.strerror}", remedy="Give --load-format dummy a folder that has config.json"
        ) from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a JSON object", remedy="Download it again")
    return dummy(config, path, task, spec)


def dummy(config: Mapping[str, Any], path: str = "", task: Task = "auto", spec: ModelSpec | None = None) -> Checkpoint:
    """The same weights each time for the same config."""
    source = Checkpoint(path, {}, config, {})
    spec = spec or load_spec(source, task)
    kind = _FLOATS.get(str(config.get("torch_dtype") or config.get("dtype")), "BF16")
    maker = Maker(kind, method_of(source), config.get("quantization_config") or {}, _numbers())
    found: dict[str, Tensor] = {}
    for slot, shape in spec.slots().items():
        name = slot_name(spec, slot)
        experts = shape[0] if slot.endswith("_experts") else 0
        names = [name.replace("*", str(expert)) for expert in range(experts)] or [name]
        for each in names:
            tensors = maker.tensors(slot, each, shape[1:] if experts else shape)
            found |= {tensor.name: tensor for tensor in tensors}
    source.tensors = found
    return unpacked(source)


def _numbers() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(_NUMBERS, np.float32)


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the tensors that a slot has in a checkpoint: floats of type `kind`, matrices of layers by `method`."""

    kind: str
    method: str | None
    table: Mapping[str, Any]
    numbers: npt.NDArray[np.float32]

    def tensors(self, slot: str, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        exact = slot.endswith((*EXACT, "_conv", "_bias"))
        product = slot.startswith("layers.") and len(shape) == 2 and not exact
        product = product and (self.method != "mxfp4" or slot.endswith("_experts"))
        if self.method is None or not product:
            spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
            ones = len(shape) == 1 and name.endswith(("weight", ".rate", ".z_norm"))  # decays that grow would run over
            yield self._floats(name, shape, self.kind, 0.0 if ones else spread, 1.0 if ones else 0.0)
        elif self.method in ("awq", "gptq"):
            yield from self._grouped(name.removesuffix(".weight"), (shape[0], shape[1]))
        elif self.method == "mxfp4":
            yield self._mxfp4(name, shape)
        else:
            yield from self._fp8(name, (shape[0], shape[1]))

    def _floats(self, name: str, shape: tuple[int, ...], kind: str, spread: float, middle: float = 0.0) -> Tensor:
        def make() -> Bytes:
            return _tiled(_stored(self._own(name) * np.float32(spread) + np.float32(middle), kind), math.prod(shape))

        return MadeTensor(name, shape, kind, make)

    def _codes(self, name: str, shape: tuple[int, ...], kind: str, mask: int = 0xFF) -> Tensor:
        """Random bytes, of which the bits of the mask may be set."""
        nbytes = math.prod(shape) * (4 if kind == "I32" else 1)

        def make() -> Bytes:
            return _tiled(self._own(name).view(np.uint8)[::4] & np.uint8(mask), nbytes)

        return MadeTensor(name, shape, kind, make)

    def _own(self, name: str) -> npt.NDArray[np.float32]:
        return np.roll(self.numbers, -zlib.crc32(name.encode()) % _NUMBERS)

    def _grouped(self, stem: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        outputs, inputs = shape
        awq, bits = self.method == "awq", int(self.table.get("bits") or 4)
        size = group_size(self.table, "group_size", "q_group_size")
        groups, per_word = -(-inputs // size) if size > 0 else 1, 32 // bits
        packed = (inputs, outputs // per_word) if awq else (inputs // per_word, outputs)
        # the middle of the codes; GPTQ stores one less
        zero = 0x88 if awq else 0x77 if bits == 4 else 0x7F
        step = (_STEP_OF_16 if bits == 4 else _STEP_OF_256) * inputs**-0.5
        yield self._codes(f"{stem}.qweight", packed, "I32")
        yield _same(f"{stem}.qzeros", (groups, outputs // per_word), "I32", np.full(4, zero, np.uint8))
        yield self._floats(f"{stem}.scales", (groups, outputs), "F16", 0.0, step)
        if not awq:
            group_of = np.minimum(np.arange(inputs) // (size if size > 0 else inputs), groups - 1).astype("<i4")
            yield Tensor(f"{stem}.g_idx", (inputs,), "I32", group_of.view(np.uint8))

    def _mxfp4(self, name: str, shape: tuple[int, ...]) -> Tensor:
        exponent = 127 + round(math.log2(shape[-1] ** -0.5 / _SPREAD_OF_E2M1))

        def make() -> Bytes:
            data = _tiled(self._own(name).view(np.uint8)[::4], nbytes("MXFP4", shape))
            data[:: BLOCKS["MXFP4"].bytes] = exponent
            return data

        return MadeTensor(name, shape, "MXFP4", make)

    def _fp8(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        block = self.table.get("weight_block_size")
        parts = (1, 1) if not block else (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        # without the highest bit of the exponent: codes below 2, and no NaN
        yield self._codes(name, shape, "F8_E4M3", 0xBF)
        end = "weight_scale_inv" if block else "weight_scale"
        yield self._floats(f"{name.removesuffix('.weight')}.{end}", parts, "F32", 0.0, shape[1] ** -0.5)


def _same(name: str, shape: tuple[int, ...], kind: str, item: Bytes) -> Tensor:
    return MadeTensor(name, shape, kind, partial(_tiled, item, math.prod(shape) * item.nbytes))


def _tiled(pattern: npt.NDArray[Any], count: int) -> Bytes:
    """`count` values: the pattern again and again."""
    return np.resize(pattern, count).view(np.uint8)


def _stored(values: npt.NDArray[np.float32], kind: str) -> npt.NDArray[Any]:
    if kind == "BF16":
        return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    return values.astype(np.float16 if kind == "F16" else np.float32)
