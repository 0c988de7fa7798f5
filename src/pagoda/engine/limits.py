"""From the configuration to numbers: how many requests, how many tokens in a step, how long a context."""

from __future__ import annotations

from pagoda.arch.memory import usual_requests
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Capacity, Limits
from pagoda.errors import ConfigError, MemoryShort
from pagoda.options.engine_config import EngineConfig
from pagoda.types import BLOCK_SIZE

_CUDA_SEQS, _CPU_SEQS = 256, 64
_CUDA_STEP_TOKENS, _CPU_STEP_TOKENS = 8192, 512
_CPU_STEP_TIME_TARGET_S = 0.05
_LEAST_KEPT = 8


def default_length(spec: ModelSpec) -> int:
    """The longest context that the model was made for."""
    trained = None if spec.pooling is None else spec.pooling.max_len
    return min(trained or spec.max_position, spec.max_position)


def resolve_limits(config: EngineConfig, spec: ModelSpec) -> Limits:
    """Put a number in place of each `auto`; ConfigError where the numbers cannot go together."""
    cuda = config.device == "cuda"
    if config.max_model_len is not None and config.max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is above {spec.max_position}, the longest context of this model",
            remedy=f"use --max-model-len {spec.max_position} or less",
            param="max_model_len",
        )
    max_num_seqs = config.max_num_seqs or usual_requests(spec, _CUDA_SEQS if cuda else _CPU_SEQS)
    step_tokens = config.max_num_batched_tokens or max(_CUDA_STEP_TOKENS if cuda else _CPU_STEP_TOKENS, max_num_seqs)
    if step_tokens < max_num_seqs:
        if config.max_num_seqs is not None:
            raise ConfigError(
                f"max_num_batched_tokens {step_tokens} is below max_num_seqs {max_num_seqs}: each running request "
                "needs one token of a step",
                remedy=f"use --max-num-batched-tokens {max_num_seqs} or more, or --max-num-seqs {step_tokens} or less",
                param="max_num_batched_tokens",
            )
        max_num_seqs = step_tokens
    max_model_len = config.max_model_len or default_length(spec)
    if spec.encoder is not None:
        step_tokens = max(step_tokens, max_model_len)
    if spec.vision is not None:  # beside what every stream needs
        step_tokens = max(step_tokens, max_num_seqs + spec.vision.at_once)
    return Limits(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        memory_share=config.memory_share,
        kv_cache_bytes=config.kv_cache_bytes,
        num_blocks=config.num_blocks,
        threads=config.threads,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        reserved_bytes=0 if cuda else config.reserved_bytes,
        enforce_eager=config.enforce_eager,
        attention_backend=config.attention_backend,
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend=config.distributed_executor_backend,
        load_format=config.load_format,
        max_loras=config.max_loras,
        max_lora_rank=config.max_lora_rank,
        mmproj=config.mmproj,
        kept_states=_kept_states(config, spec, max_num_seqs),
    )


def _kept_states(config: EngineConfig, spec: ModelSpec, max_num_seqs: int) -> int:
    """Each stream of a hybrid leaves one behind its prompt and one behind its output; some go on for long."""
    return max(_LEAST_KEPT, 4 * max_num_seqs) if spec.recurrent and config.prefix_caching else 0


def step_tokens(config: EngineConfig, limits: Limits, spec: ModelSpec) -> int:
    """The token budget of a step. An executor of an encoder is made for longer requests, each in a step of its own."""
    if spec.encoder is None:
        return limits.max_num_batched_tokens
    usual = _CUDA_STEP_TOKENS if config.device == "cuda" else _CPU_STEP_TOKENS
    return config.max_num_batched_tokens or max(usual, limits.max_num_seqs)


def step_time_target_s(config: EngineConfig) -> float | None:
    """The longest pause that a prompt may cause to running streams; None: no such limit."""
    if config.step_time_target_s is None:
        return None if config.device == "cuda" else _CPU_STEP_TIME_TARGET_S
    return config.step_time_target_s or None


def fit_context(config: EngineConfig, limits: Limits, capacity: Capacity) -> int:
    """The longest context one request can have: what was asked for, or else what the cache holds."""
    tokens = capacity.num_blocks * BLOCK_SIZE
    if tokens >= limits.max_model_len:
        return limits.max_model_len
    if config.max_model_len is None and tokens > 0:
        return tokens
    raise MemoryShort(
        f"a context of {limits.max_model_len} tokens does not fit: there is memory for a cache of {tokens} tokens",
        remedy=f"use --max-model-len {tokens} or less, or give more memory with --gpu-memory-utilization"
        if tokens
        else "give more memory with --gpu-memory-utilization, or take a smaller model",
        param="max_model_len",
    )
