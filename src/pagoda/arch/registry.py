"""From an open checkpoint to its spec: finds the file of models/ that knows the architecture."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol, cast

import numpy as np

from pagoda.arch import attached, models
from pagoda.arch.names.bind import bind_tensors, plainly_named, slot_name
from pagoda.arch.pooling import with_pooling
from pagoda.arch.projections import projection_tensors
from pagoda.arch.spec import ModelSpec
from pagoda.arch.visual import with_pixels
from pagoda.errors import ModelError
from pagoda.options.tasks import Task
from pagoda.weights.source import Tensor, TensorSource

_OTHER_NAMES = MappingProxyType(
    {
        "bailingmoe": "bailing_moe",
        "bailingmoe2": "bailing_moe",
        "bailing_moe_v2": "bailing_moe",
        "chatglm": "glm",
        "glm4moe": "glm4_moe",
        "command-r": "cohere",
        "deepseek2": "deepseek_v2",
        "gemma-embedding": "gemma3",
        "gemma3_text": "gemma3",
        "gemma4_text": "gemma4",
        "gemma4_unified": "gemma4",
        "gemma4_unified_text": "gemma4",
        "gptneox": "gpt_neox",
        "granitehybrid": "granitemoehybrid",
        "hunyuan-dense": "hunyuan_v1_dense",
        "hunyuan-moe": "hunyuan_v1_moe",
        "jina-bert-v3": "jina_embeddings_v3",
        "kimi_k2": "deepseek_v3",
        "nemotron_h_moe": "nemotron_h",
        "lfm2moe": "lfm2_moe",
        "modern-bert": "modernbert",
        "new": "gte",
        "phi2": "phi",
        "qwen2vl": "qwen2_vl",
        "qwen3vl": "qwen3_vl",
        "qwen3vlmoe": "qwen3_vl_moe",
        "qwen2moe": "qwen2_moe",
        "qwen3moe": "qwen3_moe",
        "qwen3next": "qwen3_next",
        "qwen35": "qwen3_5",
        "qwen35moe": "qwen3_5_moe",
        "smolvlm": "idefics3",
        "glm46v": "glm4v",
        "glm4v_moe": "glm4v",
        "qwen3_5_text": "qwen3_5",
        "qwen3_5_moe_text": "qwen3_5_moe",
    }
)


_REMEDIES = MappingProxyType(
    {
        "gptoss": "It is Ollama's own form of gpt-oss: take the safetensors, or llama.cpp's GGUF file",
        "internvl_chat": "Take the version of the model whose name ends with -HF",
    }
)
"""Of models that there are in another form."""


class Architecture(Protocol):
    """What a file `arch/models/<model_type>.py` offers."""

    def from_config(self, config: Mapping[str, Any]) -> ModelSpec: ...

    def from_gguf(self, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec: ...


def supported() -> list[str]:
    """The architectures that can be served, by name."""
    return sorted(module.name for module in pkgutil.iter_modules(models.__path__))


def known(name: object) -> bool:
    """Whether an architecture of this name can be served."""
    return isinstance(name, str) and _OTHER_NAMES.get(name, name.replace("-", "_")) in supported()


def load_spec(source: TensorSource, task: Task = "auto") -> ModelSpec:
    """The spec of a checkpoint, as it is run for a task.

    Raises ModelError where the architecture is unknown, a field is wrong, or the task is none of this model.
    """
    if source.metadata:
        architecture = _architecture(source.metadata.get("general.architecture"), "general.architecture")
        spec = attached.seeing(architecture.from_gguf(source.metadata, source.tensors), source.metadata, source.tensors)
        return with_pooling(spec, source, task)
    spec = _architecture(source.config.get("model_type"), "model_type in config.json").from_config(source.config)
    spec = _with_own_head(with_pixels(spec, source.path), source.tensors)
    return with_pooling(spec, source, task)


def bind(spec: ModelSpec, source: TensorSource) -> dict[str, Tensor]:
    """The tensor of every slot of the spec: nothing missing, nothing left over, all shapes right."""
    tensors = {**source.tensors, **projection_tensors(spec, source)}
    return bind_tensors(spec, tensors, gguf=bool(source.metadata))


def _architecture(name: object, where: str) -> Architecture:
    # only names of files that are here are ever imported, whatever the checkpoint says
    if not known(name):
        said = f"the architecture {name!r} is not supported" if name else f"{where} is missing"
        remedy = _REMEDIES.get(str(name), "Take another model, or a newer Pagoda")
        raise ModelError(f"{said} (supported: {', '.join(supported())})", remedy=remedy)
    module = _OTHER_NAMES.get(str(name), str(name).replace("-", "_"))
    return cast(Architecture, importlib.import_module(f"pagoda.arch.models.{module}"))


def _with_own_head(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> ModelSpec:
    """A config may say "tied" of a checkpoint whose head differs from its embedding; then the head counts."""
    if not spec.tied or spec.encoder is not None:
        return spec
    tensors = plainly_named(spec, tensors, gguf=False)
    embed, head = (tensors.get(slot_name(spec, slot)) for slot in ("embed", "head"))
    if embed and head and not _same(embed, head):
        return replace(spec, tied=False)
    return spec


def _same(a: Tensor, b: Tensor) -> bool:
    return a.type == b.type and a.shape == b.shape and np.array_equal(a.data, b.data)
