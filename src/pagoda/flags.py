"""vLLM's flags that have no effect here, or that Pagoda does not have yet: each with the sentence that says so."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.config import Setting

# name -> (default, what it means here). The default also tells how a value is read (None: text).
_ACCEPTED: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "trust_remote_code": (False, "accepted; code from a model directory is never run"),
        "disable_custom_all_reduce": (False, "nothing to do: GPUs exchange through NCCL only"),
        "enable_chunked_prefill": (True, "always on: long prompts run in chunks beside the answers"),
        "swap_space": (None, "not needed: a request that has to wait is computed again from its prefix"),
        "cpu_offload_gb": (None, "nothing to do on a CPU: the whole model is in main memory"),
        "seed": (None, "without effect on answers: each request has its own seed, its `seed` field or a random one"),
        "block_size": (None, "a block of the cache always holds 16 tokens"),
        "async_scheduling": (True, "the engine decides"),
        "attention_backend": (None, "there is one attention kernel for a CPU"),
        "compilation_config": (None, "nothing is compiled at start"),
        "optimization_level": (None, "nothing is compiled at start"),
        "cudagraph_capture_sizes": (None, "there are no CUDA graphs on a CPU"),
        "max_seq_len_to_capture": (None, "there are no CUDA graphs on a CPU"),
        "scheduling_policy": (None, "in the order they came; a request with a smaller `priority` goes first"),
        "performance_mode": (None, "the scheduler serves running answers first, then prompts"),
        "max_logprobs": (None, "clients may ask for up to 20 log-probabilities"),
        "max_parallel_loading_workers": (None, "the process of each GPU loads its own part"),
        "disable_frontend_multiprocessing": (False, "the engine is always a process of its own"),
        "api_server_count": (None, "there is one API process"),
        "numa_bind": (False, "bind the whole server with numactl where it helps"),
        "use_tqdm_on_load": (True, "the progress bar is drawn where there is a terminal"),
        "tokenizer_mode": (None, "the model's own tokenizer files are read"),
        "disable_log_requests": (False, "requests are not logged unless --enable-log-requests is given"),
        "disable_log_stats": (False, "no statistics are printed; they are at /metrics"),
        "enable_prompt_tokens_details": (False, "cached tokens are always reported in `usage`"),
        "structured_outputs_config": (None, "llguidance makes the masks; a grammar begins behind the reasoning"),
        "guided_decoding_backend": (None, "llguidance makes the masks"),
        "chat_template_content_format": (None, "decided by what the template reads"),
        "response_role": (None, "answers have the role assistant"),
        "model_impl": (None, "there is one implementation of each model"),
        "safetensors_load_strategy": (None, "files are mapped, not copied"),
        "use_v2_block_manager": (False, "there is one block manager"),
        "num_scheduler_steps": (None, "every step is scheduled"),
        "preemption_mode": (None, "a request that has to wait is computed again from its prefix"),
        "enable_server_load_tracking": (False, "the load is always measured, see /metrics"),
        "enable_auto_tool_choice": (False, "always on: tool calls are found wherever a request has tools"),
        "enable_reasoning": (False, "always on: reasoning is split off where the model's chat template has it"),
        "mm_processor_cache_gb": (None, "the latest pictures are kept decoded, 64 MiB of them"),
        "disable_mm_preprocessor_cache": (False, "the latest pictures are kept decoded, 64 MiB of them"),
        "skip_mm_profiling": (False, "memory for the image encoder is computed, not tried"),
        "mm_encoder_tp_mode": (None, "the image encoder is not split over GPUs"),
        "disable_uvicorn_access_log": (False, "there is no access log"),
    }
)

# reason -> the flags it holds for, with their defaults.
_LATER: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (
        "layers are not spread over GPUs; --tensor-parallel-size shares each layer, also over several machines with "
        "--distributed-executor-backend ray",
        {"pipeline_parallel_size": 1},
    ),
    (
        "not here; GPUs and machines share a model by --tensor-parallel-size",
        {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "nnodes": 1,
            "enable_expert_parallel": False,
            "headless": False,
            "device_ids": None,
        },
    ),
    (
        "LoRA adapters are not here yet; merge the adapter into the model",
        {"enable_lora": False, "lora_modules": (), "max_loras": 1, "max_lora_rank": 16, "max_cpu_loras": None},
    ),
    (
        "code of others is not loaded into the server, and tools run at the client",
        {"tool_parser_plugin": None, "reasoning_parser_plugin": None, "tool_server": None},
    ),
    (
        "drafts come from the text so far only, see --speculative-config",
        {"speculative_model": None, "spec_method": None, "num_speculative_tokens": None},
    ),
    (
        "videos are looked at twice a second, and pictures are decoded in one way",
        {"media_io_kwargs": None},
    ),
    (
        "a model is one revision, and code of models is never run",
        {"code_revision": None, "tokenizer_revision": None},
    ),
    (
        "a token on the command line is seen by all users of the machine; set the variable HF_TOKEN",
        {"hf_token": None},
    ),
    (
        "the model's own files say how it is pooled",
        {"pooler_config": None},
    ),
    (
        "TLS is not here yet; put a proxy such as nginx or caddy in front",
        {"ssl_keyfile": None, "ssl_certfile": None, "ssl_ca_certs": None, "enable_ssl_refresh": False},
    ),
    ("a model is used with its own tokenizer", {"tokenizer": None, "skip_tokenizer_init": False}),
    ("the model's own config.json decides", {"hf_overrides": None, "hf_config_path": None, "rope_scaling": None}),
    ("code of others is not loaded into the server", {"middleware": (), "logits_processors": ()}),
    (
        "not here yet",
        {
            "enable_sleep_mode": False,
            "kv_transfer_config": None,
            "grpc": False,
            "otlp_traces_endpoint": None,
            "kv_offloading_size": None,
            "prefix_caching_hash_algo": None,
            "enable_request_id_headers": False,
            "enable_force_include_usage": False,
            "return_tokens_as_token_ids": False,
            "enable_tokenizer_info_endpoint": False,
            "enable_log_outputs": False,
            "disable_fastapi_docs": False,
            "disable_sliding_window": False,
            "sse_keep_alive_interval": 0,
            "stream_interval": 1,
            "logprobs_mode": "raw_logprobs",
            "allowed_methods": (),
            "allowed_headers": (),
            "allow_credentials": False,
            "logging_config": None,
        },
    ),
)

_ALIASES = MappingProxyType(
    {
        "optimization_level": ("-O",),
        "compilation_config": ("-cc",),
        "pipeline_parallel_size": ("-pp",),
        "enable_expert_parallel": ("-ep",),
    }
)

_ON_LOAD = ("of the ways to quantize while loading there are int8, int4 and fp8", "Give one of them")
_PT = ("PyTorch's files are named pt", "Give --load-format pt, or leave it out")

REFUSED_VALUES: Mapping[tuple[str, str], tuple[str, str]] = MappingProxyType(
    {
        ("load_format", "bin"): _PT,
        ("load_format", "pytorch_model.bin"): _PT,
        ("quantization", "squeezellm"): (
            "SqueezeLLM is dead: vLLM dropped it and nobody publishes such models",
            "Use a GGUF file of the model (Q4_K_M is of similar size)",
        ),
        **{("quantization", name): _ON_LOAD for name in ("bitsandbytes", "experts_int8")},
    }
)


def without_effect() -> tuple[Setting, ...]:
    """Flags that are accepted; `note` is the line printed at start."""
    return tuple(
        Setting(name, _kind(default), default, note, "Accepted, without effect", _ALIASES.get(name, ()), note=note)
        for name, (default, note) in _ACCEPTED.items()
    )


def not_yet() -> tuple[Setting, ...]:
    """Flags of vLLM that are refused unless they have their default."""
    return tuple(
        Setting(name, _kind(default), default, reason, "Refused for now", _ALIASES.get(name, ()), works=False)
        for reason, names in _LATER
        for name, default in names.items()
    )


def _kind(default: Any) -> str:
    if isinstance(default, bool):
        return "bool"
    if isinstance(default, tuple):
        return "tuple[str, ...]"
    return "int" if isinstance(default, int) else "str"
