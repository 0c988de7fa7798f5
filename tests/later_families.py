"""The newer ones of the cases in family_cases.py, and what they share with the older ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deepseek_cases import LATENT

MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 32}
_COUNTED = {"expert_count": 8, "expert_used_count": 3}
SCALES = {"embedding_scale": 3.0, "attention.scale": 0.2, "residual_scale": 0.4, "logit_scale": 3.0}
FAR = {
    "attention.temperature_scale": 0.3,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
_KEPT = {
    "attention.head_count_kv": 1,
    "attention.key_length": 48,
    "attention.key_length_mla": 48,
    "attention.value_length": 32,
    "attention.value_length_mla": 32,
    "attention.kv_lora_rank": 32,
    "attention.q_lora_rank": 32,
    "rope.dimension_count": 16,
    "expert_weights_norm": True,
}

LATER_CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "granitemoeshared": {
            "model_type": "granitemoeshared",
            **MULTIPLIERS,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "shared_intermediate_size": 64,
            "tie_word_embeddings": True,
        },
        "granite_swa": {
            "model_type": "granite_swa",
            **MULTIPLIERS,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_rope_theta": [0, 5000, 5000, 0],
            "tie_word_embeddings": True,
        },
        "hy_v3": {
            "model_type": "hy_v3",
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
        },
        "falcon": {"model_type": "falcon", "hidden_size": 128, "ffn_hidden_size": 128},
        "falcon-40b": {
            "model_type": "falcon",
            "hidden_size": 128,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "ffn_hidden_size": 128,
        },
        "hyperclovax": {
            "model_type": "hyperclovax",
            **MULTIPLIERS,
            "residual_multiplier": 1.0,
            "tie_word_embeddings": True,
        },
        "helium": {"model_type": "helium", "head_dim": 16},
        "mellum": {
            "model_type": "mellum",
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "sliding_window": 24,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        "minicpm3": {
            "model_type": "minicpm3",
            **LATENT,
            "rms_norm_eps": 0.2,
            "v_head_dim": None,
            "tie_word_embeddings": True,
        },
        "mistral4": {
            "model_type": "mistral4",
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
        "gpt_neox": {"model_type": "gpt_neox", "hidden_act": "gelu"},
        "gpt_neox-serial": {"model_type": "gpt_neox", "hidden_act": "gelu", "use_parallel_residual": False},
    }
)
LATER_GGUF: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "falcon": ("falcon", {"attention.head_count_kv": 1}),
        "minicpm3": (
            "minicpm3",
            {
                "attention.kv_lora_rank": 32,
                "attention.q_lora_rank": 32,
                "attention.key_length": 48,
                "attention.value_length": 16,
                "rope.dimension_count": 16,
            },
        ),
        "mistral4": ("mistral4", {**FAR, "rope.scaling.yarn_log_multiplier": 0.1, **_KEPT, **_COUNTED}),
        **dict.fromkeys(("granitemoe", "granitemoeshared"), ("granitemoe", {**EXPERTS, **SCALES})),
        "hy_v3": (
            "hy_v3",
            {
                **EXPERTS,
                "expert_feed_forward_length": 64,
                "expert_weights_scale": 2.826,
                "expert_weights_norm": True,
                "expert_gating_func": 2,
            },
        ),
        "gpt_neox": ("gptneox", {"attention.head_count_kv": 4, "rope.dimension_count": 4}),
    }
)
