"""Solar Open: GLM-4.5's layers without norms of q and k, all with experts. In GGUF it is called glm4moe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch.models import glm4_moe
from pagoda.arch.spec import ModelSpec

from_gguf = glm4_moe.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    own = {"use_qk_norm": False, "first_k_dense_replace": 0, "intermediate_size": config.get("moe_intermediate_size")}
    spec = glm4_moe.from_config({"partial_rotary_factor": 1.0, "head_dim": 128, **config, **own})
    return replace(spec, model_type="solar_open")
