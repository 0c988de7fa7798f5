"""The language model inside the config.json of a model that sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError

_OF_BOTH = ("eos_token_id", "bos_token_id")
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_TIED = "tie_word_embeddings"
LLAMA: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
"""What transformers leaves out of a Llama inside, as it is the usual."""


def language_model(
    config: Mapping[str, Any],
    kinds: Mapping[str, Callable[[Mapping[str, Any]], ModelSpec]],
    kind: str,
    defaults: Mapping[str, Any] = _NOTHING,
) -> ModelSpec:
    """The one that `text_config` describes, of the `kinds` that are known. `kind`: what a file means that names none,
    and `defaults` what it leaves out."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise Fields(config, "config.json").error("text_config", f"is {text!r}, must be a table")
    kind = text.get("model_type") or kind
    if kind not in kinds:
        raise Fields(text, "config.json").error("model_type", f"is {kind!r} in text_config; known: {', '.join(kinds)}")
    shared = {name: config[name] for name in _OF_BOTH if config.get(name) is not None and text.get(name) is None}
    # files may say it in either place; a head of its own counts whatever they say
    said = [table[_TIED] for table in (config, text) if table.get(_TIED) is not None]
    tied = {_TIED: any(said)} if said else {}
    return kinds[kind]({**defaults, **text, **shared, **tied})


def no_gguf(name: str) -> ModelError:
    """In GGUF such models are called as their language models, and the encoder has a file of its own."""
    return ModelError(f"no GGUF file has the architecture {name}", remedy="Take the model's safetensors version")
