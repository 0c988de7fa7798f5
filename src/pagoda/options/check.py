"""Options that are well written and cannot be had on this machine, or contradict each other."""

from __future__ import annotations

from pagoda.errors import ConfigError
from pagoda.options.flags import REFUSED_VALUES
from pagoda.options.formats import QUANTIZATION_METHODS, QUANTIZE_ON_LOAD_GPU
from pagoda.options.resolve import Settings
from pagoda.options.speculation import speculation_from


def check_one_device(size: int) -> None:
    """ConfigError for a device that cannot share a model with others."""
    if size > 1:
        raise ConfigError(
            f"--tensor-parallel-size {size} needs {size} GPUs, and the model runs on the CPU here, where only 1 works",
            remedy="Leave --tensor-parallel-size out, or give 1",
            param="tensor_parallel_size",
        )


def check(settings: Settings) -> None:
    """Refuse what is well written and cannot be done on this machine; before the port and the model are touched."""
    options = settings.options
    speculation_from(options.speculative_config)
    if not all(key.strip() for key in options.api_key):
        raise ConfigError(
            "--api-key is empty: with it everybody could use this server",
            remedy="Give a key (is the variable set that should hold it?), or leave --api-key out",
            param="api_key",
        )
    if options.device in ("cpu", "reference"):  # of auto the engine knows more
        check_one_device(options.tensor_parallel_size)
    quantization = options.quantization
    if quantization is not None and quantization not in (*QUANTIZATION_METHODS, *QUANTIZE_ON_LOAD_GPU):
        message, remedy = REFUSED_VALUES.get(
            ("quantization", quantization),
            (f"{quantization} is not supported yet", "Leave it out, or use a GGUF file of the model"),
        )
        raise ConfigError(f"--quantization {quantization}: {message}", remedy=remedy)
    if options.dtype in QUANTIZE_ON_LOAD_GPU and quantization not in (None, options.dtype):
        raise ConfigError(
            f"--dtype {options.dtype} and --quantization {quantization} contradict each other",
            remedy="Give one of them",
        )
