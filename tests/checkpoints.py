"""Writes tiny random checkpoints for tests, and keeps the transformers model that they came from as the reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import torch
import transformers
from gguf_writer import write_gguf

from pagoda.arch.names.bind import checkpoint_name
from pagoda.arch.registry import bind, load_spec
from pagoda.weights.ggml import dequantize
from pagoda.weights.open import open_source

VOCAB = 256
# Every size is a multiple of 32, so that every matrix can be stored in quantized blocks too.
TINY: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
)
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# A small base and a long context spread the ramp over several pairs, so that each of these parameters shows.
_YARN_RAMP = {"rope_theta": 100.0, "beta_fast": 4.0, "beta_slow": 0.5, "original_max_position_embeddings": 128}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}


def _rope(**recipe: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **recipe}}


# GGUF has no scale of scores: that of the heads
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "tie_word_embeddings": True}

_EXPERTS = {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}

_SHARED = {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 128}

CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {"model_type": "llama"},
        "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
        "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        "llama-wide-heads": {"model_type": "llama", "head_dim": 32},
        "llama-one-kv-head": {"model_type": "llama", "num_key_value_heads": 1},
        "llama-no-gqa": {"model_type": "llama", "num_key_value_heads": 4},
        "llama-theta": {"model_type": "llama", **_rope(rope_type="default", rope_theta=500000.0)},
        "llama-linear": {"model_type": "llama", **_rope(rope_type="linear", factor=2.0)},
        "llama-dynamic": {"model_type": "llama", **_rope(rope_type="dynamic", factor=2.0)},
        "llama-llama3": {"model_type": "llama", **_rope(**_LLAMA3, original_max_position_embeddings=64)},
        "llama-yarn": {"model_type": "llama", **_rope(**_YARN)},
        "llama-yarn-betas": {"model_type": "llama", **_rope(**{**_YARN, **_YARN_RAMP})},
        "llama-yarn-smooth": {"model_type": "llama", **_rope(**{**_YARN, **_YARN_RAMP}, truncate=False)},
        "llama-yarn-mscale": {"model_type": "llama", **_rope(**_YARN, mscale=1.0, mscale_all_dim=0.5)},
        "llama-yarn-attention": {"model_type": "llama", **_rope(**_YARN, attention_factor=1.3)},
        "mistral": {"model_type": "mistral", "sliding_window": None},
        "mistral-window": {"model_type": "mistral", "sliding_window": 24},
        "qwen2": {"model_type": "qwen2"},
        "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
        "qwen2-yarn": {"model_type": "qwen2", **_rope(**_YARN)},
        "qwen2-window": {"model_type": "qwen2", **_QWEN_WINDOW},
        "qwen3": {"model_type": "qwen3", "head_dim": 32},
        "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
        "qwen3-biases": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
        "qwen3-window": {"model_type": "qwen3", "head_dim": 32, **_QWEN_WINDOW},
        "gpt2": {"model_type": "gpt2", "tie_word_embeddings": True},
        "gemma": {"model_type": "gemma", "head_dim": 32, "tie_word_embeddings": True},
        "gemma2": {"model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        "gemma3": {
            "model_type": "gemma3_text",
            **_GEMMA,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        },
        "gpt2-own-head": {"model_type": "gpt2", "activation_function": "gelu", "n_inner": 96},
    }
)
EXPERT_CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen3-experts": {**_EXPERTS, "norm_topk_prob": True},
        "qwen3-experts-as-shares": {**_EXPERTS, "norm_topk_prob": False},
        "qwen3-experts-here-and-there": {**_EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True},
        "qwen2-experts": {**_EXPERTS, **_SHARED},
        "qwen2-experts-here-and-there": {**_EXPERTS, **_SHARED, "mlp_only_layers": [1], "norm_topk_prob": True},
        "gpt-oss": {
            "model_type": "gpt_oss",
            "head_dim": 32,
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 24,
            **_rope(**{**_YARN, **_YARN_RAMP}, truncate=False),
        },
        "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    }
)

_HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "num_attention_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
_HYBRID_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
HYBRID_CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen3-next": {"model_type": "qwen3_next", **_HYBRID, **_HYBRID_EXPERTS},
        "qwen3.5": {"model_type": "qwen3_5_text", **_HYBRID, "tie_word_embeddings": True},
        "qwen3.5-experts": {"model_type": "qwen3_5_moe_text", **_HYBRID, **_HYBRID_EXPERTS},
    }
)


def make_model(case: str, **changes: Any) -> Any:
    """The transformers model (float32, CPU) of a case, with random weights that depend on nothing but the case."""
    return random_model({**TINY, **{**CASES, **EXPERT_CASES, **HYBRID_CASES}[case], **changes}, len(case))


def random_model(settings: dict[str, Any], seed: int) -> Any:
    """A transformers model (float32, CPU) of these settings."""
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config._attn_implementation = "eager"
    # one that is published only behind eyes has no place among those
    own = {"mistral4": transformers.Mistral4ForCausalLM}.get(config.model_type, transformers.AutoModelForCausalLM)
    make = own.from_config if own is transformers.AutoModelForCausalLM else own._from_config
    return with_random_weights(make(config), seed)


def with_random_weights(model: Any, seed: int) -> Any:
    """The model in float32 with weights that depend on the seed alone."""
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                embedding = "embed_tokens" in name or "wte" in name
                weight.copy_(noise * (1.0 if embedding else 1.5 * weight.shape[1] ** -0.5))
            else:
                kind = model.config.model_type
                whole = "norm" in name and (not kind.startswith("gemma") or kind.startswith("gemma4"))
                one = whole or ("ln_" in name and "bias" not in name)
                weight.copy_(0.2 * noise + (1.0 if one else 0.0))
    return model


def write_checkpoint(path: Path, case: str, *, sharded: bool = False, **changes: Any) -> Any:
    """Write a case as safetensors with config.json; returns the transformers model."""
    model = make_model(case, **changes)
    model.save_pretrained(path, max_shard_size="100KB" if sharded else "1GB")
    return model


def write_gguf_checkpoint(
    path: Path,
    model: Any,
    type: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write a transformers model as GGUF, as its converters do: matrices in `type`, all else F32.

    `more`: tensors of a head in place of the model's own.
    """
    config = model.config
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    recipe = config.rope_parameters.get("full_attention", config.rope_parameters)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    table = {
        "general.architecture": arch,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.key_length": size,
        f"{arch}.attention.value_length": size,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(recipe["rope_theta"]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **_gguf_windows(arch, config),
        **(metadata or {}),
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    tensors: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and (config.tie_word_embeddings or more):
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = neighbours(weight, heads if "q_proj" in name else kv_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensors[stored_name] = (weight.numpy(), type) if weight.ndim == 2 else weight.numpy()
    if recipe["rope_type"] == "llama3":
        plain = float(recipe["rope_theta"]) ** -(torch.arange(0, size, 2) / size)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq).numpy()
    write_gguf(path, table, {**tensors, **(more or {})})


def _gguf_windows(arch: str, config: Any) -> dict[str, Any]:
    """What Gemma 2 and 3 say beside the rest."""
    if arch not in ("gemma2", "gemma3"):
        return {}
    caps = {name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    period = config.layer_types.index("full_attention") + 1
    table = {"attention.sliding_window": config.sliding_window, **{n: float(v) for n, v in caps.items() if v}}
    table |= {"attention.sliding_window_pattern": period} if arch == "gemma3" else {}
    return {f"{arch}.{name}": value for name, value in table.items()}


def write_gguf_experts(folder: Path, kind: str, *, apart: bool = False) -> Path:
    """The checkpoint in a folder again as tiny.gguf, as converters do: matrices of layers but routers in `kind`.

    `apart`: each expert as a tensor of its own, as the first converters did.
    """
    source = open_source(str(folder))
    spec = load_spec(source)
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    arch = "llama" if spec.model_type == "mixtral" else spec.model_type.replace("_", "")
    assert mlp.experts is not None
    numbers = {
        "block_count": len(spec.layers),
        "context_length": spec.max_position,
        "embedding_length": spec.hidden_size,
        "expert_count": mlp.experts.count,
        "expert_used_count": mlp.experts.active,
        "feed_forward_length" if arch == "llama" else "expert_feed_forward_length": mlp.size,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.freq_base": float(source.config["rope_parameters"]["rope_theta"]),
    }
    tensors: dict[str, Any] = {}
    for slot, tensor in bind(spec, source).items():
        values = dequantize(tensor).copy()
        if arch == "llama" and slot.endswith((".q", ".k")):
            heads = attention.heads if slot.endswith(".q") else attention.kv_heads
            values = neighbours(torch.from_numpy(values), heads).numpy()
        stored = kind if slot.endswith(("_experts", "_shared", ".q", ".k", ".v", ".o")) else "F32"
        name = checkpoint_name(slot, gguf=True)
        if apart and slot.endswith("_experts"):
            tensors |= {name.replace("_exps", f".{i}"): (expert, stored) for i, expert in enumerate(values)}
            continue
        tensors[name] = values if values.ndim == 1 else (values, stored)
    table = {"general.architecture": arch, **{f"{arch}.{name}": value for name, value in numbers.items()}}
    write_gguf(folder / "tiny.gguf", table, tensors)
    return folder / "tiny.gguf"


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from (first halves, second halves) of the rotated pairs to pairs side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
