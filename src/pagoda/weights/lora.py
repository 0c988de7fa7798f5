"""LoRA adapters as they are stored, PEFT's folders and llama.cpp's GGUF files: their matrices by what they change."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pagoda.errors import ModelError
from pagoda.types import Adapter
from pagoda.weights.files import DOWNLOAD_AGAIN, read_small, reading
from pagoda.weights.gguf import open_gguf
from pagoda.weights.pytorch import read_pytorch
from pagoda.weights.safetensors import read_shard
from pagoda.weights.source import Tensor

CONFIG = "adapter_config.json"
_WEIGHTS = MappingProxyType({"adapter_model.safetensors": read_shard, "adapter_model.bin": read_pytorch})
_MAX_CONFIG_BYTES = 1 << 20
_MODULE = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_GGUF_MODULE = re.compile(r"(.+)\.weight\.lora_([ab])")
_MERGE = "Merge the adapter into the model (PEFT: merge_and_unload), and serve the result"
_CHANGED_BASES = ("pissa", "olora", "corda")
_REFUSED = MappingProxyType(
    {
        "use_dora": "it is a DoRA adapter, which also scales the model's own matrices",
        "modules_to_save": "it replaces whole matrices of the model (modules_to_save)",
        "layer_replication": "it repeats layers of the model",
        "lora_bias": "it changes biases (lora_bias)",
        "use_qalora": "it is a QALoRA adapter",
        "alora_invocation_tokens": "it is an activated LoRA, which begins in the middle of a prompt",
        "trainable_token_indices": "it changes embeddings of tokens",
        "fan_in_fan_out": "its matrices are those of a model that stores them turned, such as GPT-2",
    }
)


@dataclass(frozen=True, slots=True)
class StoredPair:
    """What is added to the weight [out, in] of this name: scale * up [out, rank] times down [rank, in]."""

    name: str
    down: Tensor
    up: Tensor
    scale: float


def find_adapter(name: str, path: str) -> Adapter:
    """The adapter at a path; nothing but the sizes and times of its files is looked at."""
    place = Path(os.path.expanduser(path))
    files = _files(place)
    digest = hashlib.sha256()
    with reading(place):
        for file in files:
            told = file.stat()
            digest.update(f"{file.resolve()}\0{told.st_size}\0{told.st_mtime_ns}\0{told.st_ino}\0".encode())
    return Adapter(name=name, path=str(place), stamp=digest.hexdigest())


def stored_pairs(path: str) -> tuple[list[StoredPair], bool]:
    """The matrices of an adapter, and whether they are named and ordered as in GGUF. ModelError for what is no LoRA."""
    place = Path(path)
    files = _files(place)
    if len(files) == 1:
        return _gguf_pairs(place), True
    config = _config(files[0])
    _check(files[0], config)
    return _peft_pairs(files[1], config), False


def _files(place: Path) -> list[Path]:
    """The files of an adapter: its config and weights, or a GGUF file alone."""
    if place.suffix == ".gguf":
        return [place]
    if not (place / CONFIG).exists():
        what = "holds no adapter_config.json" if place.is_dir() else "is no folder"
        raise ModelError(
            f"the LoRA adapter {place} {what}",
            remedy="Give the folder that PEFT wrote, with adapter_config.json and adapter_model.safetensors, or a "
            ".gguf file",
        )
    found = [place / name for name in _WEIGHTS if (place / name).exists()]
    if not found:
        raise ModelError(f"the LoRA adapter {place} holds no {' or '.join(_WEIGHTS)}", remedy=DOWNLOAD_AGAIN)
    return [place / CONFIG, found[0]]


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(read_small(path, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", remedy=DOWNLOAD_AGAIN) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object", remedy=DOWNLOAD_AGAIN)
    return config


def _check(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{path}: an adapter of the type {kind!r}; LORA is what can be served", remedy=_MERGE)
    for key, why in _REFUSED.items():
        if config.get(key):
            raise ModelError(f"{path}: {why}", remedy=_MERGE)
    if config.get("bias", "none") != "none":
        raise ModelError(f"{path}: it changes biases (bias: {config['bias']!r})", remedy=_MERGE)
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASES):
        raise ModelError(
            f"{path}: it was trained on a changed model (init_lora_weights: {begun!r})",
            remedy="Save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )


def _peft_pairs(path: Path, config: Mapping[str, Any]) -> list[StoredPair]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _WEIGHTS[path.name](path).items():
        match = _MODULE.fullmatch(key)
        if match is None:
            raise ModelError(f"{path}: the tensor {key} is none of a LoRA on attention or MLP", remedy=_MERGE)
        found.setdefault(match[1], {})[match[2]] = tensor
    return [_pair(path, stem, *_both(path, stem, found[stem], "AB"), config) for stem in found]


def _pair(path: Path, stem: str, down: Tensor, up: Tensor, config: Mapping[str, Any]) -> StoredPair:
    rank, alpha = down.shape[0], config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    for key, own in patterns.items() if isinstance(patterns, dict) else ():
        if stem == key.lstrip("^") or stem.endswith("." + key):
            alpha = own
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{path.with_name(CONFIG)}: lora_alpha is {alpha!r}, not a number", remedy=DOWNLOAD_AGAIN)
    return StoredPair(stem + ".weight", down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _both(path: Path, stem: str, parts: Mapping[str, Tensor], letters: str) -> tuple[Tensor, Tensor]:
    """The two matrices of a module, proven to be such as can be multiplied."""
    down, up = (parts.get(letter) for letter in letters)
    if down is None or up is None:
        raise ModelError(f"{path}: of {stem} only one of the two matrices is there", remedy=DOWNLOAD_AGAIN)
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise ModelError(f"{path}: the matrices of {stem} have the shapes {down.shape} and {up.shape}", remedy=_MERGE)
    return down, up


def _gguf_pairs(path: Path) -> list[StoredPair]:
    source = open_gguf(path)
    kind = (source.metadata.get("general.type"), source.metadata.get("adapter.type"))
    if kind != ("adapter", "lora"):
        raise ModelError(f"{path} is no LoRA adapter (general.type and adapter.type are {kind})", remedy=DOWNLOAD_AGAIN)
    alpha = source.metadata.get("adapter.lora.alpha", 0.0)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in source.tensors.items():
        match = _GGUF_MODULE.fullmatch(key)
        if match is None:
            raise ModelError(f"{path}: the tensor {key} is none of a LoRA", remedy=DOWNLOAD_AGAIN)
        found.setdefault(match[1], {})[match[2]] = tensor
    out = []
    for stem, parts in found.items():
        down, up = _both(path, stem, parts, "ab")
        out.append(StoredPair(stem + ".weight", down, up, float(alpha) / down.shape[0] if alpha else 1.0))
    return out
