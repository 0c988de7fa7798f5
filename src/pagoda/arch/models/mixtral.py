"""Mixtral: Mistral's layers, the MLP of each a mixture of full-sized ones. In GGUF it is called llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import llama
from pagoda.arch.spec import Experts, ModelSpec

from_gguf = llama.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    spec = decoder.from_config("mixtral", fields, decoder.Parts(), windows=[window] * count)
    experts = Experts(fields.integer("num_local_experts", 8), fields.integer("num_experts_per_tok", 2), True)
    return mixture.with_mixtures(spec, fields.integer("intermediate_size"), experts)
