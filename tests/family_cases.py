"""Tiny random models of the families of decoders, each with what makes it differ from Llama."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from checkpoints import TINY, neighbours, random_model
from deepseek_cases import LATENT, stored_tensors, with_lively_choices
from gguf_writer import write_gguf
from later_families import EXPERTS, FAR, LATER_CASES, LATER_GGUF, MULTIPLIERS, SCALES, YARN
from mamba_cases import STATE_SPACE_CASES, STATE_SPACE_GGUF

SMALL: Mapping[str, Any] = MappingProxyType({**TINY, "num_hidden_layers": 2, "pad_token_id": 0})
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
    "partial_rotary_factor": 0.75,
}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_CONVOLVES = ["conv", "full_attention", "conv", "conv"]
_GROUPED = {
    "head_dim": 32,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "n_group": 4,
    "topk_group": 2,
}

CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "phi3": {"model_type": "phi3", "sliding_window": 24},
        "phi3-long": {
            "model_type": "phi3",
            "tie_word_embeddings": True,
            "rope_parameters": _LONG,
            "original_max_position_embeddings": 48,
        },
        "phi": {"model_type": "phi", "hidden_act": "gelu_new", "rope_parameters": _PARTIAL},
        "starcoder2": {"model_type": "starcoder2", "tie_word_embeddings": True},
        "seed_oss": {"model_type": "seed_oss", "head_dim": 32},
        "ernie4_5": {"model_type": "ernie4_5", "use_bias": True, "head_dim": 16, "tie_word_embeddings": True},
        "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "tie_word_embeddings": True},
        "cohere": {"model_type": "cohere", "logit_scale": 0.3, "tie_word_embeddings": True},
        "cohere2": {
            "model_type": "cohere2",
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "tie_word_embeddings": True,
        },
        "glm": {"model_type": "glm", "head_dim": 32, "attention_bias": True, "rope_parameters": _PARTIAL},
        "stablelm": {"model_type": "stablelm", "use_qkv_bias": True, "rope_parameters": _PARTIAL},
        "stablelm-parallel": {
            "model_type": "stablelm",
            "use_parallel_residual": True,
            "rope_parameters": _PARTIAL,
        },
        "granite": {"model_type": "granite", **MULTIPLIERS, "tie_word_embeddings": True},
        "granite4": {
            "model_type": "granitemoehybrid",
            **MULTIPLIERS,
            "layer_types": ["attention"] * 2,
            "position_embedding_type": "rope",
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 128,
        },
        "glm4": {"model_type": "glm4", "head_dim": 32, "attention_bias": True, "rope_parameters": _PARTIAL},
        "hunyuan": {
            "model_type": "hunyuan_v1_dense",
            "head_dim": 32,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
        },
        "olmo2": {"model_type": "olmo2"},
        "olmo3": {
            "model_type": "olmo3",
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "rope_parameters": {
                "full_attention": {**YARN, "attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "exaone4": {"model_type": "exaone4", "num_hidden_layers": 4, "sliding_window": 24},
        "exaone4-full": {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2},
        "ministral3": {
            "model_type": "ministral3",
            "head_dim": 32,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
        "internlm3": {"model_type": "internlm3", "head_dim": 32, "attention_bias": True, "mlp_bias": True},
        "minimax_m2": {
            "model_type": "minimax_m2",
            "head_dim": 32,
            "rotary_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
        },
        "ernie4_5_moe": {
            "model_type": "ernie4_5_moe",
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 32,
            "tie_word_embeddings": True,
        },
        "olmoe": {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32},
        "dots1": {
            "model_type": "dots1",
            **_GROUPED,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "sliding_window": None,
        },
        "dots1-window": {
            "model_type": "dots1",
            **_GROUPED,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "sliding_window": 24,
            "max_window_layers": 1,
        },
        "exaone_moe": {
            "model_type": "exaone_moe",
            **_GROUPED,
            "num_experts": 8,
            "num_hidden_layers": 4,
            "sliding_window": 24,
        },
        "arcee": {"model_type": "arcee", "head_dim": 32},
        "nemotron": {"model_type": "nemotron", "head_dim": 32, "rope_parameters": _PARTIAL},
        "jais2": {"model_type": "jais2", "head_dim": 32},
        "iquestcoder": {"model_type": "iquestcoder", "head_dim": 32},
        "ministral": {
            "model_type": "ministral",
            "head_dim": 32,
            "sliding_window": 24,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "cwm": {"model_type": "cwm", "head_dim": 32, "sliding_window": 24},
        "solar_open": {
            "model_type": "solar_open",
            **_GROUPED,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "attention_bias": True,
        },
        "youtu": {
            "model_type": "youtu",
            **LATENT,
            "tie_word_embeddings": True,
        },
        "lfm2": {
            "model_type": "lfm2",
            "num_hidden_layers": 4,
            "layer_types": _CONVOLVES,
            "intermediate_size": 256,
            "block_multiple_of": 64,
            "conv_L_cache": 4,
            "tie_word_embeddings": True,
        },
        "lfm2_moe": {
            "model_type": "lfm2_moe",
            "num_hidden_layers": 4,
            "layer_types": _CONVOLVES,
            "num_dense_layers": 1,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 1.7,
            "tie_word_embeddings": True,
        },
        "granitemoe": {
            "model_type": "granitemoe",
            **MULTIPLIERS,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "tie_word_embeddings": True,
        },
        **LATER_CASES,
        **STATE_SPACE_CASES,
    }
)

_GROUPED_EXPERTS = {
    **EXPERTS,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.7,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
}
# what converters to GGUF call a family, and what they write beside that which all have
_GGUF: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "phi3": ("phi3", {"attention.sliding_window": 24}),
        "phi3-long": ("phi3", {"rope.dimension_count": 12, "rope.scaling.original_context_length": 48}),
        "phi": ("phi2", {"rope.dimension_count": 8}),
        "starcoder2": ("starcoder2", {}),
        "seed_oss": ("seed_oss", {}),
        "ernie4_5": ("ernie4_5", {}),
        "smollm3": ("smollm3", {}),
        "cohere": ("command-r", {"logit_scale": 0.3}),
        "cohere2": ("cohere2", {"logit_scale": 0.0625, "attention.sliding_window": 24}),
        "glm": ("chatglm", {"rope.dimension_count": 16}),
        "glm4": ("glm4", {"rope.dimension_count": 16}),
        "granite": ("granite", SCALES),
        "hunyuan": ("hunyuan-dense", {"rope.freq_base": 10000.0 * 50.0 ** (32 / 30), "rope.scaling.type": "none"}),
        "olmo2": ("olmo2", {}),
        "exaone4": ("exaone4", {"attention.sliding_window": 24}),
        "exaone4-full": ("exaone4", {}),
        "ministral3": ("mistral3", {**FAR, "rope.scaling.yarn_log_multiplier": 1.0}),
        "stablelm": ("stablelm", {"rope.dimension_count": 8}),
        "minimax_m2": ("minimax-m2", {"rope.dimension_count": 16, **EXPERTS, "expert_gating_func": 2}),
        "ernie4_5_moe": ("ernie4_5-moe", EXPERTS),
        "olmoe": ("olmoe", {"expert_count": 8, "expert_used_count": 3}),
        "dots1": ("dots1", _GROUPED_EXPERTS),
        "exaone_moe": ("exaone-moe", {**_GROUPED_EXPERTS, "attention.sliding_window": 24}),
        "arcee": ("arcee", {}),
        "jais2": ("jais2", {}),
        "nemotron": ("nemotron", {"rope.dimension_count": 16}),
        "lfm2": ("lfm2", {"feed_forward_length": 192, "shortconv.l_cache": 4, "attention.head_count_kv": [0, 2, 0, 0]}),
        "lfm2_moe": (
            "lfm2moe",
            {
                **EXPERTS,
                "expert_gating_func": 2,
                "expert_weights_scale": 1.7,
                "shortconv.l_cache": 3,
                "attention.head_count_kv": [0, 2, 0, 0],
            },
        ),
        **LATER_GGUF,
        **STATE_SPACE_GGUF,
    }
)
IN_GGUF = tuple(_GGUF)
_NORMED_BY_ROOT = ("lfm2", "lfm2_moe")
"""Families with RMS norms whose configs do not say so by the name of their epsilon."""
_REORDERED = (
    *("smollm3", "granite", "ministral3", "granitemoe", "granitemoeshared", "arcee", "granite4-hybrid"),
    "granite4-experts",
)
"""Families whose rows of q and k converters put in the order of Llama's."""


def make_family(case: str, **changes: Any) -> Any:
    """The transformers model (float32, CPU) of a case."""
    return with_lively_choices(random_model({**SMALL, **CASES[case], **changes}, len(case)))


def write_family(path: Path, case: str, **changes: Any) -> Any:
    """Write a case as safetensors with config.json; returns the transformers model."""
    model = make_family(case, **changes)
    model.save_pretrained(path)
    return model


def write_family_gguf(path: Path, case: str, model: Any, kind: str = "F32") -> None:
    """Write a model of a case as converters to GGUF do: matrices in `kind`, all else F32."""
    arch, more = _GGUF[case]
    by_root = {"attention.layer_norm_rms_epsilon": float(model.config.norm_eps)} if case in _NORMED_BY_ROOT else {}
    plus = 1 if case == "nemotron" else 0  # as its norms multiply
    write_model_gguf(path, model, arch, {**by_root, **more}, kind, reordered=case in _REORDERED, plus=plus)


def write_model_gguf(
    path: Path, model: Any, arch: str, more: Mapping[str, Any], kind: str, *, reordered: bool, plus: int = 0
) -> None:
    """`reordered`: the rows of q and k, as of Llama's. `plus` is added to the weights of norms."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    eps = next(
        n
        for n in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
        if getattr(config, n, None) is not None
    )
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        f"attention.layer_norm_{'rms_' if 'rms' in eps else ''}epsilon": float(getattr(config, eps)),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        **more,
    }
    tensors: dict[str, Any] = {}
    for name, values in stored_tensors(model, arch):
        if reordered and (".attn_q." in name or ".attn_k." in name):
            values = neighbours(torch.from_numpy(values), heads if ".attn_q." in name else kv_heads).numpy()
        if name.endswith("norm.weight"):
            values = values + plus
        exact = (
            values.ndim == 1
            or "ffn_gate_inp" in name
            or any(part in name for part in ("shortconv.conv", "ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm"))
        )
        tensors[name] = values if exact else (values, kind)
    for length in ("long", "short"):
        if f"{length}_factor" in rope:
            factors = np.asarray(rope[f"{length}_factor"], np.float32)
            tensors[f"rope_factors_{length}.weight"] = factors
            numbers["rope.scaling.attn_factor"] = float(model.model.rotary_emb.attention_scaling)
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    write_gguf(path, {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in numbers.items()}, **ends}, tensors)


def tokens_of(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy tokens that transformers gives behind a prompt."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
