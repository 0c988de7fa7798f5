"""Granite with experts and a shared one beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import mixture
from pagoda.arch.fields import Fields
from pagoda.arch.models import granitemoe
from pagoda.arch.spec import ModelSpec

from_gguf = granitemoe.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    shared = Fields(config, "config.json").integer("shared_intermediate_size", 0, least=0)
    spec = replace(granitemoe.from_config(config), model_type="granitemoeshared")
    return mixture.with_experts(spec, lambda e: replace(e, shared=shared, shared_gate=False))
