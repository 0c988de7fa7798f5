"""Baichuan and Baichuan2 7B: Llama's layers. Those of 13B have no RoPE but ALiBi, which is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_LAYERS_OF_13B = 40


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    # its makers publish no tokenizer.json, and no file says whether the head is to be normalized
    raise ModelError("Baichuan models are read from GGUF only", remedy="Take a GGUF file of the model")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    # as for Llama, converters reorder the rows of q and k
    spec = decoder.from_gguf("baichuan", metadata, tensors, interleaved=True)
    if len(spec.layers) == _LAYERS_OF_13B:
        raise ModelError("Baichuan 13B has ALiBi in place of RoPE, which is not supported", remedy="Take the 7B model")
    return spec
