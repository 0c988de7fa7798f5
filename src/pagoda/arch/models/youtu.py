"""Youtu-LLM: DeepSeek-V3's latent attention, and no experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import mla
from pagoda.arch.fields import Fields
from pagoda.arch.models import deepseek_v2
from pagoda.arch.spec import ModelSpec

from_gguf = deepseek_v2.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"tie_word_embeddings": True, **config}, "config.json")
    return mla.from_config("youtu", fields, interleaved=fields.flag("rope_interleave", True))
