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
from mamba_gguf import converted

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

_GROUPS = {"n_group": 4, "topk_group": 2}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
# a small base and a long context spread the ramp over several pairs
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 128,
}

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
            **_GROUPS,
            "norm_topk_prob": False,
            "rope_parameters": _PARTIAL,
        },
        "deepseek_v2-lite": {
            "model_type": "deepseek_v2",
            **_EXPERTS,
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": _YARN,
        },
        "deepseek_v2": {
            "model_type": "deepseek_v2",
            **_EXPERTS,
            **LATENT,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
        },
        "deepseek_v3": {"model_type": "deepseek_v3", **_EXPERTS, **LATENT, **_GROUPS, "rope_parameters": _YARN},
        "hunyuan_v1_moe": {
            "model_type": "hunyuan_v1_moe",
            "head_dim": 32,
            "num_experts": 8,
            "moe_topk": [3] * 3,
            "intermediate_size": 64,
            "pad_token_id": 0,
        },
        "glm4_moe_lite": {"model_type": "glm4_moe_lite", **_EXPERTS, **LATENT, "rms_norm_eps": 1e-5},
    }
)
_GGUF: Mapping[str, str] = MappingProxyType({"glm4_moe": "glm4moe", "hunyuan_v1_moe": "hunyuan-moe"})


def make_case(case: str, **changes: Any) -> Any:
    """The transformers model (float32, CPU) of a case."""
    return with_lively_choices(random_model({**TINY, **CASES[case], **changes}, len(case)))


def with_lively_choices(model: Any) -> Any:
    """The model with biases of its experts, and scales of its layers, such that they matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, values in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                values.copy_(0.3 * torch.randn(values.shape, generator=generator))
            if name.endswith("layer_scalar"):
                values.copy_(0.5 + torch.rand(values.shape, generator=generator))
    return model


def write_case(path: Path, case: str, **changes: Any) -> Any:
    """Write a case as safetensors with config.json; returns the transformers model."""
    model = make_case(case, **changes)
    model.save_pretrained(path)
    return model


def write_case_gguf(
    path: Path, model: Any, kind: str = "F32", words: Mapping[str, Any] | None = None, *, old: bool = False
) -> None:
    """Write a model as converters to GGUF do: matrices in `kind`, all else F32. `old`: with k_b and v_b in one."""
    config = model.config
    arch = _GGUF.get(config.model_type, "deepseek2")
    tensors: dict[str, Any] = {}
    for name, values in stored_tensors(model, arch, old):
        tensors[name] = (values, kind) if values.ndim > 1 and "ffn_gate_inp" not in name else values
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    table = {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in _numbers(config, old).items()}}
    write_gguf(path, {**table, **(ends if words is None else words)}, tensors)


def _numbers(config: Any, old: bool) -> dict[str, Any]:
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        **_of_experts(config),
        **(_latent(config, old) if hasattr(config, "kv_lora_rank") else _heads(config)),
    }
    if (recipe := config.rope_parameters)["rope_type"] == "yarn":
        numbers |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": recipe["factor"],
            "rope.scaling.original_context_length": recipe["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": recipe["beta_fast"],
            "rope.scaling.yarn_beta_slow": recipe["beta_slow"],
            "rope.scaling.yarn_log_multiplier": 0.1 * recipe["mscale_all_dim"],
        }
    return {name: value for name, value in numbers.items() if value is not None}


def _of_experts(config: Any) -> dict[str, Any]:
    if config.model_type == "hunyuan_v1_moe":
        size = {"expert_feed_forward_length": config.intermediate_size}
        return {"expert_count": config.num_experts, "expert_used_count": config.moe_topk[0], **size}
    return {
        "leading_dense_block_count": getattr(config, "first_k_dense_replace", 1),
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }


def _latent(config: Any, old: bool) -> dict[str, Any]:
    """Files that have the matrices of both directions in one speak of heads as they would be without what is kept."""
    size, turned = config.qk_nope_head_dim + config.qk_rope_head_dim, config.qk_rope_head_dim
    apart = {"attention.key_length_mla": size, "attention.value_length_mla": config.v_head_dim}
    return {
        "attention.head_count_kv": config.num_attention_heads if old else 1,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": size if old else config.kv_lora_rank + turned,
        "attention.value_length": config.v_head_dim if old else config.kv_lora_rank,
        "rope.dimension_count": turned,
        "expert_gating_func": None if config.model_type == "deepseek_v2" else 2,
        **({} if old else apart),
    }


def _heads(config: Any) -> dict[str, Any]:
    return {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        **({"rope.dimension_count": config.head_dim // 2} if config.model_type == "glm4_moe" else {}),
        "expert_gating_func": 2 if config.model_type == "glm4_moe" else None,
    }


def stored_tensors(model: Any, arch: str, old: bool = False) -> Iterator[tuple[str, Any]]:
    """The tensors under the names of converters."""
    # one that the package does not know yet, and one with q, k and v in one matrix: all else is called alike
    arch = "dots1" if arch in ("hy_v3", "bailingmoe2") else arch
    arch_id = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    old = old or arch == "minicpm3"
    names = gguf.get_tensor_name_map(arch_id, model.config.num_hidden_layers)
    hub = model.state_dict().items()
    for name, values in (part for stem, weight in hub for part in converted(model.config, stem, weight.numpy())):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        layer = name.split(".")[2] if ".layers." in name else ""
        values = values.squeeze(1) if name.endswith("conv.conv.weight") else values
        if name.startswith("blk."):
            yield name, values
        elif name.endswith("experts.gate_up_proj") and arch == "mistral4":  # left as they are
            yield f"blk.{layer}.ffn_gate_up_exps.weight", values
        elif name.endswith(("experts.gate_up_proj", "shared_mlp.input_linear.weight")):
            kind = "exps" if "experts" in name else "shexp"
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=-2), strict=True):
                yield f"blk.{layer}.ffn_{part}_{kind}.weight", np.ascontiguousarray(half)
        elif name.endswith("experts.down_proj"):
            yield f"blk.{layer}.ffn_down_exps.weight", values
        elif name.endswith("kv_b_proj.weight") and not old:
            c = model.config
            own = values.reshape(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
            k_b, v_b = own[:, : c.qk_nope_head_dim], own[:, c.qk_nope_head_dim :]
            yield f"blk.{layer}.attn_k_b.weight", np.ascontiguousarray(k_b.transpose(0, 2, 1))
            yield f"blk.{layer}.attn_v_b.weight", np.ascontiguousarray(v_b)
        elif arch == "gptneox" and ".query_key_value." in name:  # stored head by head
            own = np.split(values, 3 * model.config.num_attention_heads)
            whole = np.concatenate([part for i in range(3) for part in own[i::3]])
            yield f"blk.{layer}.attn_qkv.{name.rpartition('.')[2]}", whole
        elif name.endswith(("e_score_correction_bias", "expert_bias")):
            bare = model.config.model_type == "hy_v3"
            yield f"blk.{layer}.exp_probs_b{'' if bare else '.bias'}", values.reshape(-1)
        else:
            name = name.replace(".router.weight", ".router.layer.weight")
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert stored is not None, name
            yield stored, values


_V2_ROPE = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
PUBLIC: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "deepseek_v2-lite": {
            "model_type": "deepseek_v2",
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "routed_scaling_factor": 1.0,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "moe_layer_freq": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "max_position_embeddings": 163840,
            "rope_theta": 10000,
            "rope_scaling": _V2_ROPE,
            "rms_norm_eps": 1e-06,
        },
        "deepseek_v3": {
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "max_position_embeddings": 163840,
            "rope_theta": 10000,
            "rope_scaling": {**_V2_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0},
            "rms_norm_eps": 1e-06,
        },
        "glm4_moe_lite": {
            "model_type": "glm4_moe_lite",
            "vocab_size": 154880,
            "hidden_size": 2048,
            "intermediate_size": 10240,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 47,
            "num_attention_heads": 20,
            "n_shared_experts": 1,
            "n_routed_experts": 64,
            "num_experts_per_tok": 4,
            "routed_scaling_factor": 1.8,
            "kv_lora_rank": 512,
            "q_lora_rank": 768,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "max_position_embeddings": 202752,
            "rope_theta": 1000000,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-05,
        },
        "glm4_moe": {
            "model_type": "glm4_moe",
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "use_qk_norm": False,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000,
            "rms_norm_eps": 1e-05,
        },
    }
)
