"""What --quantization may ask of a checkpoint: the method it was made with, or to quantize it while it is loaded."""

from __future__ import annotations

from pagoda.config import QUANTIZATION_METHODS, QUANTIZE_ON_LOAD
from pagoda.errors import ConfigError
from pagoda.weights.ggml import BLOCKS
from pagoda.weights.source import TensorSource


def method_of(source: TensorSource) -> str | None:
    """How a checkpoint says that its weights are quantized; None for float weights."""
    if source.metadata:
        return "gguf"
    table = source.config.get("quantization_config")
    if table is None:
        return None
    return str((isinstance(table, dict) and table.get("quant_method")) or "an unknown method").lower()


def check_quantization(source: TensorSource, asked: str | None) -> None:
    """ConfigError where --quantization asks for what the weights are not, or cannot become."""
    if asked is None:
        return
    if asked in QUANTIZATION_METHODS:
        found = method_of(source) or "not quantized"
        if QUANTIZATION_METHODS[asked] != found:
            raise _refused(f"--quantization {asked}: the weights in {source.path} are {found}")
        return
    if asked not in QUANTIZE_ON_LOAD:
        known = ", ".join((*QUANTIZATION_METHODS, *QUANTIZE_ON_LOAD))
        raise ConfigError(f"--quantization {asked} is not known", remedy=f"Give one of {known}", param="quantization")
    kinds = {tensor.type for tensor in source.tensors.values() if len(tensor.shape) == 2}
    if quantized := sorted(kind for kind in kinds if BLOCKS[kind].elements > 1):
        raise _refused(
            f"--quantization {asked} needs float weights, and those in {source.path} are {', '.join(quantized)} already"
        )


def _refused(message: str) -> ConfigError:
    return ConfigError(message, remedy="Leave --quantization out", param="quantization")
