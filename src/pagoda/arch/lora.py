"""LoRA adapters of a model: read into its slots, and the bytes that they take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pagoda.arch.mamba import Mamba
from pagoda.arch.memory import Limits
from pagoda.arch.names.bind import plainly_named, slot_name
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ConfigError, ModelError
from pagoda.types import Adapter, Float32
from pagoda.weights.files import DOWNLOAD_AGAIN
from pagoda.weights.ggml import dequantize
from pagoda.weights.lora import StoredPair, find_adapter, stored_pairs
from pagoda.weights.parts import rows
from pagoda.weights.source import Tensor

ADAPTABLE = ("q", "k", "v", "q_gate", "z", "beta", "decay", "o", "gate", "up", "down")
"""The slots of a layer that adapters may change."""

_REORDERED = (
    *("llama", "granite", "smollm3", "ministral3", "mistral3"),
    *("arcee", "baichuan", "deepseek", "granitemoe", "granitemoeshared", "minicpm", "xverse"),
)
"""Families whose rows of q and k converters to GGUF reorder, so that the pairs of a rotation are neighbours."""

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a product x times weight^T: (x times down^T) times up^T. The adapter's scale is in `up`."""

    down: Float32  # [rank, in]
    up: Float32  # [out, rank]


AdapterWeights = Mapping[str, LowRank]
"""By slot, such as layers.0.q."""


_OTHER_NAMES = ("bailing_moe", "exaone", "falcon", "gpt2", "gpt_neox", "internlm2", "lfm2", "lfm2_moe")
"""Families whose checkpoints, and so their adapters, call their matrices otherwise."""


def adaptable(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The slots that adapters of a model may change, with their shapes."""
    slots = spec.slots().items()
    return {s: shape for s, shape in slots if s.startswith("layers.") and s.rpartition(".")[2] in ADAPTABLE}


def adapters_bytes(spec: ModelSpec, limits: Limits, itemsize: int = _FLOAT32_BYTES) -> int:
    """What as many adapters take as may be there at once, each of the largest rank and on all that it may change."""
    each = sum(rows + columns for rows, columns in adaptable(spec).values()) if limits.max_loras else 0
    return limits.max_loras * limits.max_lora_rank * each * itemsize


def check_adapters(spec: ModelSpec) -> None:
    """ConfigError for a kind of model that takes no adapters."""
    why = ""
    if spec.encoder is not None or spec.pooling is not None:
        why = "this model gives vectors or scores, and adapters are for models that generate"
    elif any(layer.attention.latent is not None for layer in spec.layers):
        why = "adapters for models with latent attention are not read"
    elif any(isinstance(layer.delta, Mamba) for layer in spec.layers):
        why = "adapters for models with state spaces are not read"
    elif spec.model_type in _OTHER_NAMES or not adaptable(spec):
        why = f"adapters for models of the type {spec.model_type} are not read"
    if why:
        raise ConfigError(f"--enable-lora: {why}", remedy="Merge the adapter into the model, and serve the result")


def read_adapter(adapter: Adapter, spec: ModelSpec, *, gguf: bool, max_rank: int) -> AdapterWeights:
    """The matrices of an adapter, in float32, for a model that came from a GGUF file or not.

    ModelError where it is damaged, was made for another model, or changes what adapters cannot change here.
    """
    if find_adapter(adapter.name, adapter.path).stamp != adapter.stamp:
        raise ModelError(
            f"the files of the LoRA adapter {adapter.name!r} were changed since it was loaded",
            remedy="Load it again, or start the server again",
        )
    pairs, ordered = stored_pairs(adapter.path)
    names = {slot_name(spec, slot, gguf=ordered): slot for slot in adaptable(spec)}
    turned = gguf != ordered and spec.model_type in _REORDERED
    found: dict[str, LowRank] = {}
    for pair in pairs:
        if pair.down.shape[0] > max_rank:
            raise ModelError(
                f"the LoRA adapter {adapter.name!r} has the rank {pair.down.shape[0]}, and up to {max_rank} was asked "
                "for",
                remedy=f"Start with --max-lora-rank {pair.down.shape[0]}",
            )
        named = plainly_named(spec, {pair.name: pair.up}, gguf=ordered)
        if not named:  # a part of the model that is left out
            raise _elsewhere(adapter, pair)
        for name, up in named.items():
            slot = names.get(name)
            if slot is None:
                raise _elsewhere(adapter, pair)
            if turned and slot.endswith((".q", ".k")):
                up = _reordered(spec, slot, up, to_gguf=gguf)
            found[slot] = _low_rank(adapter, spec.slots()[slot], pair, up)
    if not found:
        raise ModelError(f"the LoRA adapter {adapter.name!r} changes nothing of this model", remedy=DOWNLOAD_AGAIN)
    return found


def _low_rank(adapter: Adapter, shape: tuple[int, ...], pair: StoredPair, up: Tensor) -> LowRank:
    if (up.shape[0], pair.down.shape[1]) != shape:
        raise ModelError(
            f"the LoRA adapter {adapter.name!r} was made for another model: it changes {pair.name} as one of the shape "
            f"{(up.shape[0], pair.down.shape[1])}, which is {shape} here",
            remedy="adapter_config.json names the model in base_model_name_or_path",
        )
    low = LowRank(dequantize(pair.down), dequantize(up) * np.float32(pair.scale))
    if not (math.isfinite(low.down.sum()) and math.isfinite(low.up.sum())):
        raise ModelError(f"the LoRA adapter {adapter.name!r} holds numbers that are none", remedy=DOWNLOAD_AGAIN)
    return low


def _reordered(spec: ModelSpec, slot: str, up: Tensor, *, to_gguf: bool) -> Tensor:
    """The rows of q or k in the other order: of each head its halves taken in turns, or put one behind the other."""
    size = spec.layers[int(slot.split(".")[1])].attention.head_dim
    if up.shape[0] % size:
        return up  # of another model: the shape tells
    places = np.arange(up.shape[0], dtype=np.intp).reshape((-1, 2, size // 2) if to_gguf else (-1, size // 2, 2))
    return rows(up, places.swapaxes(1, 2).reshape(-1))


def _elsewhere(adapter: Adapter, pair: StoredPair) -> ModelError:
    what = f"it changes {pair.name}, and a LoRA may change the products of attention and MLP here"
    if "expert" in pair.name or "block_sparse_moe" in pair.name:
        what = f"it changes experts of a mixture ({pair.name}), which is not supported"
    elif "embed" in pair.name or "lm_head" in pair.name or "token_embd" in pair.name:
        what = f"it changes the embeddings or the head ({pair.name}), which is not supported"
    elif "visual" in pair.name or "vision" in pair.name:
        what = f"it changes the picture encoder ({pair.name}), which is not supported"
    return ModelError(
        f"the LoRA adapter {adapter.name!r} cannot be served: {what}",
        remedy="Merge it into the model (PEFT: merge_and_unload), and serve the result",
    )
