"""EXAONE 4.5: the language model of EXAONE 4 behind eyes, which are not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch import inside
from pagoda.arch.models import exaone4
from pagoda.arch.spec import ModelSpec

_TEXT = MappingProxyType({"exaone4": exaone4.from_config, "exaone4_5_text": exaone4.from_config})

from_gguf = exaone4.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return replace(inside.language_model(config, _TEXT, "exaone4"), model_type="exaone4_5")
