"""Tiny random models of Gemma 4, in both formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from checkpoints import VOCAB, random_model
from deepseek_cases import with_lively_choices
from family_cases import SMALL
from gguf_writer import write_gguf

_GEMMA4 = {
    "model_type": "gemma4_text",
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 24,
    "final_logit_softcapping": 5.0,
    "tie_word_embeddings": True,
}
CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "dense": {
            **_GEMMA4,
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2, "full_attention"],
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
        },
        "experts": {
            **_GEMMA4,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "moe_intermediate_size": 32,
        },
    }
)
_EXACT = ("ffn_gate_inp", "norm", "scale")


def write_gemma4(path: Path, case: str) -> Any:
    """Write a case as safetensors with config.json; returns the transformers model."""
    model = with_lively_choices(random_model({**SMALL, **CASES[case]}, len(case)))
    model.save_pretrained(path)
    return model


def write_gemma4_gguf(path: Path, model: Any, kind: str = "F32") -> None:
    """Matrices in `kind`, all else F32."""
    config = model.config
    near = [each == "sliding_attention" for each in config.layer_types]
    wide = config.per_layer_config[near.index(False)]
    first_shared = config.num_hidden_layers - config.num_kv_shared_layers
    twice = [1 + (config.use_double_wide_mlp and i >= first_shared) for i in range(config.num_hidden_layers)]
    narrow = config.per_layer_config[near.index(True)]
    heads = [narrow.num_key_value_heads if local else wide.num_key_value_heads for local in near]
    numbers: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": [config.intermediate_size * n for n in twice]
        if 2 in twice
        else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": heads,
        "attention.key_length": wide.head_dim,
        "attention.value_length": wide.head_dim,
        "attention.key_length_swa": narrow.head_dim,
        "attention.value_length_swa": narrow.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": near,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count": wide.head_dim,
        "rope.dimension_count_swa": narrow.head_dim,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }
    if config.enable_moe_block:
        counts = {"expert_count": config.num_experts, "expert_used_count": config.top_k_experts}
        numbers |= counts | {"expert_feed_forward_length": config.moe_intermediate_size}
    tensors: dict[str, Any] = {
        name: values if values.ndim == 1 or any(part in name for part in _EXACT) else (values, kind)
        for name, values in _named(model)
    }
    turned = wide.head_dim // 8  # pairs, of which the others stand still
    tensors["rope_freqs.weight"] = np.asarray([1.0] * turned + [1e30] * (3 * turned), np.float32)
    table = {f"gemma4.{name}": value for name, value in numbers.items()}
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    write_gguf(path, {"general.architecture": "gemma4", **table, **ends}, tensors)


def _named(model: Any) -> Iterator[tuple[str, Any]]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, model.config.num_hidden_layers)
    own = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        layer, rest = name.split(".", 3)[2:] if ".layers." in name else ("", "")
        if rest in own:
            yield f"blk.{layer}.{own[rest]}", weight.numpy()
            continue
        name = f"{name}.weight" if "experts." in rest or rest == "layer_scalar" else name
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        yield stored, weight.numpy()
