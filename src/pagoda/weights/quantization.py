"""What --quantization may ask of a checkpoint: the method it was made with, or to quantize it while it is loaded."""

from __future__ import annotations

from pagoda.errors import ConfigError
from pagoda.options.formats import QUANTIZATION_METHODS, QUANTIZE_ON_LOAD, QUANTIZE_ON_LOAD_GPU
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


def check_quantization(source: TensorSource, asked: str | None, *, gpu: bool = False) -> None:
    """ConfigError where --quantization asks for what the weights are not, or cannot become."""
    if asked is None:
        return
    found = method_of(source)
    if asked in QUANTIZATION_METHODS and not (asked == "fp8" and found in (None, "compressed-tensors")):
        if QUANTIZATION_METHODS[asked] != found:
            said = found or "not quantized"
            raise _refused(f"--quantization {asked}: the weights in {source.path} are {said}")
        return
    if found == "compressed-tensors" and asked == "fp8":
        return  # of that method only FP8 can be opened
    if asked not in (QUANTIZE_ON_LOAD_GPU if gpu else QUANTIZE_ON_LOAD):
        if asked in QUANTIZE_ON_LOAD_GPU:
            raise ConfigError(
                f"--quantization {asked} makes {asked} of float weights on a GPU only",
                remedy=f"On a CPU give {' or '.join(QUANTIZE_ON_LOAD)}",
                param="quantization",
            )
        known = ", ".join((*QUANTIZATION_METHODS, *QUANTIZE_ON_LOAD))
        raise ConfigError(f"--quantization {asked} is not known", remedy=f"Give one of {known}", param="quantization")
    kinds = {tensor.type for tensor in source.tensors.values() if len(tensor.shape) > 1}
    quantized = sorted(kind for kind in kinds if BLOCKS[kind].elements > 1)
    # a CPU makes floats of FP8, a GPU keeps it
    if quantized or (gpu and found not in (None, "gguf")):
        what = ", ".join(quantized) or found
        raise _refused(f"--quantization {asked} needs float weights, and those in {source.path} are {what} already")


def _refused(message: str) -> ConfigError:
    return ConfigError(message, remedy="Leave --quantization out", param="quantization")
