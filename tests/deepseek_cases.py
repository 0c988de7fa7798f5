"""Tiny random models of DeepSeek's kind, with latent attention, grouped experts or both, in both formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from checkpoints import TINY, random_model
from gguf_writer import write_gguf

_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "glm4_moe": {
            "model_type": "glm4_moe",
            **_EXPERTS,
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": True,
            "rope_parameters": _PARTIAL,
        },
        "glm4_moe-groups": {
            "model_type": "glm4_moe",
            **_EXPERTS,
            "head_dim": 32,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "rope_parameters": _PARTIAL,
        },
    }
)
_GGUF: Mapping[str, str] = MappingProxyType({"glm4_moe": "glm4moe"})


def make_case(case: str, **changes: Any) -> Any:
    """The transformers model (float32, CPU) of a case, its experts' biases such that they matter."""
    model = random_model({**TINY, **CASES[case], **changes}, len(case))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, values in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                values.copy_(0.3 * torch.randn(values.shape, generator=generator))
    return model


def write_case(path: Path, case: str, **changes: Any) -> Any:
    """Write a case as safetensors with config.json; returns the transformers model."""
    model = make_case(case, **changes)
    model.save_pretrained(path)
    return model


def write_case_gguf(path: Path, model: Any, kind: str = "F32", words: Mapping[str, Any] | None = None) -> None:
    """Write a model as converters to GGUF do: matrices in `kind`, all else F32."""
    config = model.config
    arch = _GGUF[config.model_type]
    tensors: dict[str, Any] = {}
    for name, values in _stored(model, arch):
        tensors[name] = (values, kind) if values.ndim > 1 and "ffn_gate_inp" not in name else values
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    table = {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in _numbers(config).items()}}
    write_gguf(path, {**table, **(ends if words is None else words)}, tensors)


def _numbers(config: Any) -> dict[str, Any]:
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        **_heads(config),
    }


def _heads(config: Any) -> dict[str, Any]:
    return {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim // 2,
        "expert_gating_func": 2,
    }


def _stored(model: Any, arch: str) -> Iterator[tuple[str, Any]]:
    """The tensors under the names of converters."""
    arch_id = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(arch_id, model.config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values, layer = weight.numpy(), name.split(".")[2] if ".layers." in name else ""
        if name.endswith("experts.gate_up_proj"):
            size = values.shape[1] // 2
            yield f"blk.{layer}.ffn_gate_exps.weight", np.ascontiguousarray(values[:, :size])
            yield f"blk.{layer}.ffn_up_exps.weight", np.ascontiguousarray(values[:, size:])
        elif name.endswith("experts.down_proj"):
            yield f"blk.{layer}.ffn_down_exps.weight", values
        elif name.endswith("e_score_correction_bias"):
            yield f"blk.{layer}.exp_probs_b.bias", values
        else:
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert stored is not None, name
            yield stored, values
