"""Writes hybrids with a gated delta net as GGUF, laid out as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_writer import write_gguf

_ARCHITECTURES = {"qwen3_next": "QWEN3NEXT", "qwen3_5_text": "QWEN35", "qwen3_5_moe_text": "QWEN35MOE"}


def write_hybrid(path: Path, model: Any, kind: str = "F32") -> None:
    """Matrices of the products in `kind`. One block more than the model has predicts several tokens."""
    config = model.config
    enum = getattr(gguf.MODEL_ARCH, _ARCHITECTURES[config.model_type])
    arch, tiled = gguf.MODEL_ARCH_NAMES[enum], config.model_type != "qwen3_next"
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    tensors: dict[str, Any] = {}
    for name, weight in _converted(model, tiled):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        product = weight.ndim > 1 and not any(part in stored for part in ("conv1d", "_inp", "token_embd", "ssm_ba"))
        tensors[stored] = (weight.float().numpy(), kind if product else "F32")
    count = config.num_hidden_layers
    if tiled:
        tensors[f"blk.{count}.attn_norm.weight"] = np.ones(config.hidden_size, np.float32)
    write_gguf(path, _metadata(config, arch, count + tiled) | {f"{arch}.nextn_predict_layers": int(tiled)}, tensors)


def _metadata(config: Any, arch: str, blocks: int) -> dict[str, Any]:
    numbers = {
        "block_count": blocks,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
        "full_attention_interval": 4,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }
    if hasattr(config, "moe_intermediate_size"):
        numbers |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    else:
        numbers["feed_forward_length"] = config.intermediate_size
    return {"general.architecture": arch, **{f"{arch}.{name}": value for name, value in numbers.items()}}


def _converted(model: Any, tiled: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under the hub's names, or under their own where the hub has them in one."""
    config = model.config
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    dk, dv, shared = config.linear_key_head_dim, config.linear_value_head_dim, values // keys

    def heads(weight: torch.Tensor, size: int) -> torch.Tensor:
        """Value heads, which lie together by their key head, so that they take key heads in turns."""
        apart = weight.reshape(keys, shared, size, *weight.shape[1:])
        return apart.transpose(0, 1).reshape(weight.shape) if tiled else weight

    for name, weight in model.state_dict().items():
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("in_proj_qkvz.weight"):
            q, k, v, z = weight.reshape(keys, -1, weight.shape[1]).split([dk, dk, shared * dv, shared * dv], dim=1)
            yield f"{block}attn_qkv.weight", torch.cat([part.flatten(0, 1) for part in (q, k, v)])
            yield f"{block}attn_gate.weight", z.flatten(0, 1).contiguous()
        elif "in_proj_qkv." in name or "conv1d" in name:
            weight = weight.squeeze(1)
            yield name, torch.cat([weight[: 2 * keys * dk], heads(weight[2 * keys * dk :], dv)])
        elif "in_proj_z" in name:
            yield name, heads(weight, dv)
        elif "in_proj_a." in name or "in_proj_b." in name:
            yield name, heads(weight, 1)
        elif name.endswith("A_log"):
            yield name, -torch.exp(heads(weight, 1))
        elif name.endswith("dt_bias"):
            yield name.replace("dt_bias", "dt_proj.bias"), heads(weight, 1)
        elif "linear_attn.out_proj" in name:
            yield name, heads(weight.t(), dv).t().contiguous()
        elif name.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, dim=1)
            yield f"{block}ffn_gate_exps.weight", gate.contiguous()
            yield f"{block}ffn_up_exps.weight", up.contiguous()
        elif name.endswith("experts.down_proj"):
            yield f"{block}ffn_down_exps.weight", weight
        elif name.endswith("shared_expert_gate.weight"):
            yield name, weight[0]
        else:
            yield name, weight + 1 if name.endswith("norm.weight") and "linear_attn" not in name else weight
