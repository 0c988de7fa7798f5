"""vLLM's flags that have no effect here, or that Pagoda does not have yet: each with the sentence that says so."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.options.accepted import ACCEPTED, ACCEPTED_ALIKE
from pagoda.options.setting import Setting

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
            "node_rank": 0,
            "master_addr": "127.0.0.1",
            "data_parallel_address": None,
            "data_parallel_rank": None,
            "data_parallel_start_rank": None,
            "data_parallel_external_lb": False,
            "data_parallel_hybrid_lb": False,
            "data_parallel_multi_port_external_lb": False,
            "data_parallel_supervisor_port": None,
            "dp_supervisor_probe_failure_threshold": None,
            "dp_supervisor_probe_interval_s": None,
            "dp_supervisor_probe_timeout_s": None,
            "enable_elastic_ep": False,
            "elastic_ep_max_dp_size": None,
            "enable_eplb": False,
            "eplb_config": None,
            "expert_placement_strategy": "linear",
            "enable_hc_sp": False,
        },
    ),
    (
        "an engine that died is started again, and its requests go on; there is nothing to set",
        {"enable_fault_tolerance": False, "fault_tolerance_config": None},
    ),
    (
        "the whole model is in the memory of its device",
        {
            "offload_backend": "auto",
            "offload_group_size": 0,
            "offload_num_in_group": 1,
            "offload_params": (),
            "offload_prefetch_step": 1,
            "cpu_offload_params": (),
        },
    ),
    (
        "code of others is not loaded into the server, and tools run at the client",
        {
            "tool_parser_plugin": None,
            "reasoning_parser_plugin": None,
            "tool_server": None,
            "io_processor_plugin": None,
            "model_class_overrides": None,
            "scheduler_cls": None,
            "worker_cls": "auto",
            "worker_extension_cls": None,
        },
    ),
    (
        "drafts come from the text so far only, see --speculative-config",
        {
            "speculative_model": None,
            "spec_method": None,
            "num_speculative_tokens": None,
            "spec_model": None,
            "spec_tokens": None,
        },
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
    ("restart the server for a new certificate", {"enable_ssl_refresh": False}),
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
            "enable_log_outputs": False,
            "disable_sliding_window": False,
            "logprobs_mode": "raw_logprobs",
            "enable_scale_out": False,
            "tokens_only": False,
            "grpc_port": None,
            "enable_prompt_embeds": False,
            "enable_mm_embeds": False,
            "mm_encoder_only": False,
            "enable_return_routed_experts": False,
            "enable_trace_replay": False,
            "return_sampling_mask": False,
            "enable_per_request_metrics": False,
            "per_request_spec_decode_metrics": "none",
            "enable_nccl_comm_suspend": False,
            "sleep_mode_offload_cudagraph": False,
            "sleep_preserve_parameter_names": (),
            "quantization_config": None,
            "kv_cache_dtype_skip_layers": (),
            "kv_offloading_backend": "native",
            "max_num_queued_tokens": None,
            "language_model_only": False,
            "video_pruning_method": "evs",
            "video_pruning_rate": None,
            "kv_events_config": None,
            "ec_manager_config": None,
            "ec_transfer_config": None,
            "aux_output_config": None,
            "diffusion_config": None,
            "engram_config": None,
            "profiler_config": None,
            "reasoning_config": None,
            "watermark_config": None,
            "weight_transfer_config": None,
            "cohere_format": "cmd4",
            "cohere_is_reasoning_model": True,
            "anthropic_disabled_thinking_effort": "auto",
        },
    ),
    (
        "adapters are those of the language model",
        {
            "default_mm_loras": None,
            "enable_tower_connector_lora": False,
            "enable_moe_shared_loras": False,
            "lora_target_modules": (),
            "max_lora_cls_labels": None,
        },
    ),
)

_ALIASES = MappingProxyType(
    {
        "optimization_level": ("-O",),
        "compilation_config": ("-cc",),
        "pipeline_parallel_size": ("-pp",),
        "enable_expert_parallel": ("-ep",),
        "decode_context_parallel_size": ("-dcp",),
        "prefill_context_parallel_size": ("-pcp",),
        "api_server_count": ("-asc",),
        "attention_config": ("-ac",),
        "diffusion_config": ("-dc",),
        "nnodes": ("-n",),
        "node_rank": ("-r",),
        "data_parallel_address": ("-dpa",),
        "data_parallel_backend": ("-dpb",),
        "data_parallel_external_lb": ("-dpe",),
        "data_parallel_hybrid_lb": ("-dph",),
        "data_parallel_multi_port_external_lb": ("-dpm",),
        "data_parallel_rank": ("-dpn",),
        "data_parallel_rpc_port": ("-dpp",),
        "data_parallel_size_local": ("-dpl",),
        "data_parallel_start_rank": ("-dpr",),
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
    alike = {name: (default, note) for note, names in ACCEPTED_ALIKE for name, default in names.items()}
    return tuple(
        Setting(name, _kind(default), default, note, "Accepted, without effect", _ALIASES.get(name, ()), note=note)
        for name, (default, note) in ({**ACCEPTED, **alike}).items()
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
