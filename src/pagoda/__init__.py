"""Pagoda: LLM inference and serving."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagoda.engine.beams import BeamSearchParams
    from pagoda.engine.llm_adapters import LoRARequest
    from pagoda.engine.outputs import CompletionOutput, RequestOutput
    from pagoda.engine.pooled import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        PoolingRequestOutput,
        ScoringRequestOutput,
    )
    from pagoda.integrations.llm import LLM
    from pagoda.types import PoolingParams, SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "BeamSearchParams",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "LoRARequest",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
]
__version__ = "0.1.0"

_HOMES = MappingProxyType(
    {
        "LLM": "pagoda.integrations.llm",
        "BeamSearchParams": "pagoda.engine.beams",
        "ClassificationRequestOutput": "pagoda.engine.pooled",
        "CompletionOutput": "pagoda.engine.outputs",
        "EmbeddingRequestOutput": "pagoda.engine.pooled",
        "LoRARequest": "pagoda.engine.llm_adapters",
        "PoolingParams": "pagoda.types",
        "PoolingRequestOutput": "pagoda.engine.pooled",
        "RequestOutput": "pagoda.engine.outputs",
        "SamplingParams": "pagoda.types",
        "ScoringRequestOutput": "pagoda.engine.pooled",
        "StructuredOutputsParams": "pagoda.types",
    }
)


def __getattr__(name: str) -> Any:
    """Import a public name when it is used, so that `import pagoda` and the command line stay light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pagoda' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
