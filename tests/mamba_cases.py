"""Tiny random models with state spaces, for family_cases."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from later_families import EXPERTS, MULTIPLIERS, SCALES

_STATE_SPACES = {
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_chunk_size": 16,
}
_NEMOTRON_H = {
    "num_hidden_layers": None,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 16,
    "time_step_min": 1e-9,  # transformers cuts the steps of a prompt off there, but not those of single tokens
}
STATE_SPACE_CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "granite4-hybrid": {
            "model_type": "granitemoehybrid",
            **MULTIPLIERS,
            **_STATE_SPACES,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 128,
            "tie_word_embeddings": True,
        },
        "granite4-experts": {
            "model_type": "granitemoehybrid",
            **MULTIPLIERS,
            **_STATE_SPACES,
            "mamba_n_groups": 2,
            "mamba_conv_bias": False,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "shared_intermediate_size": 64,
        },
        "nemotron_h": {
            "model_type": "nemotron_h",
            **_NEMOTRON_H,
            "layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp"],
        },
        "nemotron_h-experts": {
            "model_type": "nemotron_h",
            **_NEMOTRON_H,
            "layers_block_type": ["mamba", "moe", "mamba", "attention", "moe", "mamba", "moe"],
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 64,
            "routed_scaling_factor": 1.7,
        },
    }
)
_STATE_SPACE = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 1,
    "ssm.inner_size": 128,
    "ssm.time_step_rank": 8,
    "rope.scaling.finetuned": False,
    "attention.head_count_kv": [0, 2, 0],
}
_NEMOTRON_H_IN_GGUF = {**_STATE_SPACE, "ssm.group_count": 2, "attention.head_count_kv": [0, 0, 0, 2, 0]}
STATE_SPACE_GGUF: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "granite4-hybrid": ("granitehybrid", {**SCALES, **_STATE_SPACE}),
        "granite4-experts": ("granitehybrid", {**SCALES, **_STATE_SPACE, **EXPERTS, "ssm.group_count": 2}),
        "nemotron_h": ("nemotron_h", _NEMOTRON_H_IN_GGUF),
        "nemotron_h-experts": (
            "nemotron_h_moe",
            {
                **_NEMOTRON_H_IN_GGUF,
                "attention.head_count_kv": [0, 0, 0, 2, 0, 0, 0],
                **EXPERTS,
                "expert_weights_norm": True,
                "expert_weights_scale": 1.7,
            },
        ),
    }
)
"""What converters to GGUF call them, and what they write beside that which all have."""
