"""What a plan needs to know of a model: its spec and the type of each matrix, from config.json or from the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pagoda.arch.registry import bind, known, load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.options.tasks import Task
from pagoda.weights.files import Checkpoint
from pagoda.weights.open import open_source
from pagoda.weights.quantization import method_of
from pagoda.weights.source import Tensor

_FLOATS = MappingProxyType({"bfloat16": "BF16", "float16": "F16", "float32": "F32"})
_PACKED = MappingProxyType(
    {"awq": "U4G", "gptq": "U4G", "fp8": "F8_E4M3", "compressed-tensors": "F8_E4M3", "mxfp4": "MXFP4"}
)
_SERVED = ("awq", "gptq", "gguf", "fp8", "compressed-tensors", "mxfp4", None)
_LANGUAGE_PARTS = MappingProxyType({"qwen3_vl": "qwen3"})
_GROUP = 128
NO_IMAGES = "this is the language model alone: an image encoder of this kind cannot be planned, nor served yet"


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """`tensors`: slot -> a tensor whose data nobody reads. `method`: how they are quantized; None for floats."""

    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    method: str | None
    group: int
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All of them, also the experts that a token does not use, and the vision encoder's."""
        return sum(int(np.prod(shape)) for shape in self.spec.slots().values())


def planned_model(path: Path, task: Task = "auto", mmproj: str | None = None) -> PlannedModel:
    """From a folder, a .gguf file or a config.json. Without weights in the folder, its config.json says it all.

    `mmproj` is the image encoder of a GGUF model, None for one that lies beside it.
    """
    if path.name == "config.json":
        return _from_config(path, (), task)
    has_weights = not path.is_dir() or any(any(path.glob(f"*.{end}")) for end in ("safetensors", "gguf", "bin"))
    if not has_weights:
        return _from_config(path / "config.json", ("there are no weights here: planned from config.json alone",), task)
    try:
        source = open_source(str(path), mmproj)
        spec = load_spec(source, task)
        tensors = bind(spec, source)
    except ModelError as error:
        if not (path / "config.json").exists():
            raise
        return _from_config(path / "config.json", (f"planned from config.json alone: {error.message}",), task)
    return PlannedModel(spec, tensors, method_of(source), _group(source.config))


def _from_config(path: Path, notes: tuple[str, ...], task: Task) -> PlannedModel:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror}", remedy="Give a folder that has config.json, or a .gguf file"
        ) from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON", remedy="Download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object", remedy="Download it again")
    return model_of_config(config, notes, str(path.parent), task)


def model_of_config(
    config: dict[str, Any], notes: tuple[str, ...], path: str = "", task: Task = "auto"
) -> PlannedModel:
    """The model that a config.json describes; `path` is where its weights would be."""
    kind_name = config.get("model_type")
    if not known(kind_name) and ("vision_config" in config or kind_name in _LANGUAGE_PARTS):
        config, notes = _language_part(config), (*notes, NO_IMAGES)
    source = Checkpoint(path, {}, config, {})
    spec, method = load_spec(source, task), method_of(source)
    if method not in _SERVED:
        notes = (*notes, f"weights in {method} can be planned, but not served yet")
    kind = _FLOATS.get(str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"), "BF16")
    model = PlannedModel(spec, _tensors(spec, kind), method, _group(config), notes)
    return model if method is None else packed(model, method, int(_table(config).get("bits") or 0))


def _language_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model inside a vision model; its image positions cost no memory."""
    inner = config.get("text_config")
    shared = {
        k: config[k] for k in ("quantization_config", "torch_dtype", "dtype", "tie_word_embeddings") if k in config
    }
    found = {**shared, **inner} if isinstance(inner, dict) else dict(config)
    kind = str(config.get("model_type"))
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(recipe := found.pop(key, None), dict) and "rope_theta" in recipe:
            found["rope_theta"] = recipe["rope_theta"]
    return {**found, "model_type": _LANGUAGE_PARTS.get(kind, found.get("model_type"))}


def packed(model: PlannedModel, method: str, bits: int = 0) -> PlannedModel:
    """The model as its version quantized with `method` would be: the matrices of its layers packed."""
    kind = "U8G" if bits == 8 and method == "gptq" else _PACKED.get(method)
    if kind is None:
        raise ModelError(f"weights quantized with {method} cannot be planned", remedy=f"Known: {', '.join(_PACKED)}")
    tensors = {
        slot: replace(tensor, type=kind) if _is_packed(slot, tensor, method) else tensor
        for slot, tensor in _tensors(model.spec, "F16" if kind in ("U4G", "U8G") else "BF16").items()
    }
    return replace(model, tensors=tensors, method=method)


def _is_packed(slot: str, tensor: Tensor, method: str) -> bool:
    if method == "mxfp4":
        return slot.endswith("_experts")
    return slot.startswith("layers.") and len(tensor.shape) > 1 and not slot.endswith(("router", "_bias"))


def _tensors(spec: ModelSpec, kind: str) -> dict[str, Tensor]:
    nothing = np.empty(0, np.uint8)
    return {slot: Tensor(slot, shape, kind, nothing) for slot, shape in spec.slots().items()}


def _table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    table = config.get("quantization_config")
    return table if isinstance(table, dict) else {}


def _group(config: Mapping[str, Any]) -> int:
    """Inputs that share a scale in a packed matrix."""
    size = _table(config).get("group_size", _table(config).get("q_group_size"))
    return size if isinstance(size, int) and size > 0 else _GROUP
