"""GLM-4-0414 and GLM-Z1: GLM-4's layers with norms in front of both halves and behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.models import glm
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return glm.of_config("glm4", config, "both")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    # of models that see converters reorder the rows of q and k, so that pairs stand in halves
    seen = Fields(metadata, "GGUF metadata", "glm4.").token_ids("rope.dimension_sections")
    return decoder.from_gguf("glm4", metadata, tensors, parts=decoder.Parts(interleaved=not any(seen), norms="both"))
