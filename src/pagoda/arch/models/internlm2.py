"""InternLM2 and InternLM2.5: Llama's layers under names of their own, with q, k and v in one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    bias = fields.flag("bias", True)
    return decoder.from_config("internlm2", fields, decoder.Parts(qkv_bias=bias, out_bias=bias))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    # as for Llama, converters reorder the rows of q and k
    return decoder.from_gguf("internlm2", metadata, tensors, interleaved=True)
