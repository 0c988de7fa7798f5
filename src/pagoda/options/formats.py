"""The names of number formats that options take: what is made while loading, and how checkpoints were made."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

QUANTIZE_ON_LOAD = ("int8", "int4")
"""Values of --quantization that make 8 or 4 bits of float weights while they are loaded."""

QUANTIZE_ON_LOAD_GPU = (*QUANTIZE_ON_LOAD, "fp8")
"""Those of a GPU."""

KV_EIGHT_BITS = ("int8", "q8_0", "fp8", "fp8_e4m3", "fp8_e5m2")
"""Values of --kv-cache-dtype that ask for a cache of 8 bits."""

QUANTIZATION_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "gguf": "gguf",
        "awq": "awq",
        "awq_marlin": "awq",
        "auto_awq": "awq",
        "gptq": "gptq",
        "gptq_marlin": "gptq",
        "fp8": "fp8",
        "mxfp4": "mxfp4",
        "compressed-tensors": "compressed-tensors",
    }
)
"""Values of --quantization that say how a checkpoint was made -> the method. They choose nothing, and must be true."""

EIGHT_BITS_OF_INT4 = ("v", "down", "down_experts", "down_shared")
"""Slots that suffer most from rounding: --quantization int4 makes 8 bits of them."""

EXACT = ("router", "beta", "decay")
"""Slots of small matrices that decide much: they stay as they are stored, or in float32."""

INT4_GROUP = 32
"""Inputs that share a scale in what int4 makes on a GPU."""


def on_load_gpu(quantization: str | None, slot: str, inputs: int) -> str | None:
    """What is made of a matrix in floats: int8, fp8, int4, "w8" (8 bits with a scale for each group), or None."""
    if slot == "head" or slot.rpartition(".")[2] in EXACT or (quantization == "int4" and inputs % INT4_GROUP):
        return None  # rounding a head costs more than it saves
    if quantization == "int4" and slot.rpartition(".")[2] in EIGHT_BITS_OF_INT4:
        return "w8"
    return quantization
