"""Tiny models of families that transformers lacks: those of others with the same layers, stored under their names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from checkpoints import random_model
from deepseek_cases import with_lively_choices
from family_cases import SMALL, write_model_gguf
from safetensors.torch import save_file

_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32, "shared_intermediate_size": 64}
_GGUF_EXPERTS = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 32,
    "expert_shared_count": 2,
    "expert_weights_norm": True,
}
# Granite's layers are those of others where all its multipliers are 1, and the scale of scores the usual one
_PLAIN_GRANITE = {"model_type": "granitemoeshared", **_EXPERTS, "attention_multiplier": 0.25}
_OF_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 32, "first_k_dense_replace": 0}


@dataclass(frozen=True)
class Renamed:
    """`of`: settings of the transformers model. `config`: what the family's own config says beside or in their place.
    `names`: its spelling for a part of a name. `arch`: its name in GGUF, with `numbers` that are written there.
    """

    of: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    arch: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    reordered: bool = True
    published: bool = True  # False: read from GGUF only


_GRANITE_SPLIT = {
    r"block_sparse_moe\.router\.layer": "mlp.gate",
    r"block_sparse_moe\.router": "mlp.gate",
    r"block_sparse_moe\.experts": "mlp.experts",
    r"shared_mlp\.output_linear": "mlp.shared_experts.down_proj",
}
_BAILING = {
    r"model\.embed_tokens": "model.word_embeddings",
    r"self_attn\.o_proj": "attention.dense",
    r"self_attn\.q_norm": "attention.query_layernorm",
    r"self_attn\.k_norm": "attention.key_layernorm",
    r"self_attn\.qkv": "attention.query_key_value",
    r"gate\.e_score_correction_bias": "gate.expert_bias",
}

CASES: Mapping[str, Renamed] = MappingProxyType(
    {
        "minicpm": Renamed(
            {
                "model_type": "granite",
                "tie_word_embeddings": True,
                "embedding_multiplier": 12.0,
                "residual_multiplier": 1.4 / 2**0.5,
                "logits_scaling": 2.0,
                "attention_multiplier": 0.25,
            },
            {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32},
            arch="minicpm",
            numbers={"embedding_scale": 12.0, "residual_scale": 1.4 / 2**0.5, "logit_scale": 2.0},
        ),
        "internlm2": Renamed(
            {"model_type": "llama"},
            {"bias": False},
            {
                r"model\.embed_tokens": "model.tok_embeddings",
                "lm_head": "output",
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm",
                r"self_attn\.qkv": "attention.wqkv",
                r"self_attn\.o_proj": "attention.wo",
                r"mlp\.gate_proj": "feed_forward.w1",
                r"mlp\.up_proj": "feed_forward.w3",
                r"mlp\.down_proj": "feed_forward.w2",
            },
            arch="internlm2",
        ),
        "exaone": Renamed(
            {"model_type": "llama"},
            {"num_layers": 2, "num_hidden_layers": None, "activation_function": "silu", "layer_norm_epsilon": 1e-6},
            {
                r"model\.embed_tokens": "transformer.wte",
                r"model\.norm": "transformer.ln_f",
                r"model\.layers": "transformer.h",
                "input_layernorm": "ln_1",
                "post_attention_layernorm": "ln_2",
                r"self_attn\.o_proj": "attn.attention.out_proj",
                r"self_attn\.": "attn.attention.",
                r"mlp\.gate_proj": "mlp.c_fc_0",
                r"mlp\.up_proj": "mlp.c_fc_1",
                r"mlp\.down_proj": "mlp.c_proj",
            },
            arch="exaone",
            reordered=False,
        ),
        "mimo": Renamed({"model_type": "qwen2"}, arch="qwen2", reordered=False),
        "xverse": Renamed({"model_type": "llama"}, arch="xverse"),
        "baichuan": Renamed({"model_type": "llama", "num_key_value_heads": 4}, arch="baichuan", published=False),
        "orion": Renamed(
            {
                "model_type": "stablelm",
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            },
            {"rms_norm_eps": 1e-5},
            arch="orion",
            reordered=False,
        ),
        "deepseek": Renamed(
            _PLAIN_GRANITE,
            {**_OF_EXPERTS, "n_routed_experts": 8, "n_shared_experts": 2, "norm_topk_prob": True},
            _GRANITE_SPLIT,
            arch="deepseek",
            numbers=_GGUF_EXPERTS,
        ),
        "bailing_moe": Renamed(
            _PLAIN_GRANITE,
            {**_OF_EXPERTS, "num_experts": 8, "num_shared_experts": 2, "norm_topk_prob": True},
            {**_GRANITE_SPLIT, **_BAILING},
            arch="bailingmoe",
            numbers={**_GGUF_EXPERTS, "rope.dimension_count": 16},
        ),
        "bailing_moe_v2": Renamed(
            {
                "model_type": "glm4_moe",
                "head_dim": 32,
                "use_qk_norm": True,
                "n_routed_experts": 8,
                "n_shared_experts": 1,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 32,
                "routed_scaling_factor": 2.5,
                "n_group": 4,
                "topk_group": 2,
                "first_k_dense_replace": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            },
            {"num_experts": 8, "num_shared_experts": 1, "score_function": "sigmoid"},
            _BAILING,
            arch="bailingmoe2",
            numbers={
                **_GGUF_EXPERTS,
                "rope.dimension_count": 16,
                "expert_gating_func": 2,
                "expert_weights_scale": 2.5,
                "expert_group_count": 4,
                "expert_group_used_count": 2,
            },
            reordered=False,
        ),
    }
)
_ONE_MATRIX = ("internlm2", "bailing_moe", "bailing_moe_v2")


def write_renamed(path: Path, case: str) -> Any:
    """Write a case as safetensors with config.json, where it is published so, and as tiny.gguf; returns the model."""
    c = CASES[case]
    model = with_lively_choices(random_model({**SMALL, **c.of}, len(case)))
    if c.published:
        config = {**model.config.to_dict(), **c.config, "model_type": case}
        (path / "config.json").write_text(json.dumps(config))
        save_file(_stored(case, model), path / "model.safetensors")
    write_model_gguf(path / "tiny.gguf", model, c.arch, c.numbers, "F32", reordered=c.reordered)
    return model


def _stored(case: str, model: Any) -> dict[str, torch.Tensor]:
    tensors = {
        name: values
        for name, values in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    tensors = _with_experts_apart(tensors)
    if case in _ONE_MATRIX:
        tensors = _with_one_matrix(tensors, model.config, by_group=case == "internlm2")
    out = {}
    for name, values in tensors.items():
        for usual, own in CASES[case].names.items():
            name = re.sub(rf"(^|(?<=\.)){usual}", own, name)
        out[name] = values.clone().contiguous()
    return out


def _with_experts_apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor for each matrix of each expert."""
    out: dict[str, torch.Tensor] = {}
    for name, values in tensors.items():
        stem = name.rpartition(".")[0]
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            for i, own in enumerate(values):
                parts = own.chunk(2) if name.endswith("gate_up_proj") else (own,)
                names = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
                out |= {f"{stem}.{i}.{part}.weight": half for part, half in zip(names, parts, strict=True)}
        elif name.endswith("shared_mlp.input_linear.weight"):
            prefix = name.removesuffix("shared_mlp.input_linear.weight") + "mlp.shared_experts."
            out |= {
                f"{prefix}{part}_proj.weight": half for part, half in zip(("gate", "up"), values.chunk(2), strict=True)
            }
        else:
            out[name] = values
    return out


def _with_one_matrix(tensors: dict[str, torch.Tensor], config: Any, *, by_group: bool) -> dict[str, torch.Tensor]:
    """q, k and v one behind the other; or of each KV head its queries, its key and its value."""
    out = dict(tensors)
    for name in tensors:
        if not name.endswith("self_attn.q_proj.weight"):
            continue
        q, k, v = (out.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv")
        if by_group:
            groups = zip(*(values.chunk(config.num_key_value_heads) for values in (q, k, v)), strict=True)
            whole = torch.cat([part for group in groups for part in group])
        else:
            whole = torch.cat((q, k, v))
        out[name.replace("q_proj", "qkv")] = whole
    return out
