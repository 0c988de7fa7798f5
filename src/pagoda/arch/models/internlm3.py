"""InternLM3: Llama's layers, with biases under names of its own. In GGUF it is called llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.models import llama
from pagoda.arch.spec import ModelSpec

DEFAULT_HEAD_DIM = 128

from_gguf = llama.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    qkv = fields.flag("qkv_bias", fields.flag("attention_bias", False))
    bias = fields.flag("bias", fields.flag("mlp_bias", False))
    return decoder.from_config(
        "internlm3", fields, decoder.Parts(qkv_bias=qkv, out_bias=bias, mlp_bias=bias), head_dim=DEFAULT_HEAD_DIM
    )
