"""A tiny random llama with a byte-level tokenizer and a chat template, written to a folder: a model in no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, MLP, CONTEXT = 64, 2, 4, 2, 16, 128, 256
SPECIAL = ("<s>", "</s>")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ prefix or 'assistant' }}:{% endif %}"
)


def write(folder: Path) -> str:
    """The folder, with config.json, weights, tokenizer and defaults in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }
    files = {
        "config.json": config,
        "generation_config.json": {"temperature": 0.5, "top_k": 7, "eos_token_id": 1},
        "tokenizer_config.json": {"chat_template": TEMPLATE, "eos_token": "</s>"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    save_file(_weights(vocab), str(folder / "model.safetensors"))
    return str(folder)


def write_adapter(folder: Path, size: float = 1.0) -> str:
    """A LoRA adapter of the model, as PEFT stores it; the folder."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    wide = np.full((2, HIDDEN), size, np.float32)
    save_file(
        {f"{name}.lora_A.weight": wide, f"{name}.lora_B.weight": wide.T.copy()}, folder / "adapter_model.safetensors"
    )
    return str(folder)


def _tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**{text: i for i, text in enumerate(SPECIAL)}, **{c: i + len(SPECIAL) for i, c in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def _weights(vocab: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 2.0 / np.sqrt(columns), (rows, columns)).astype(np.float32)

    out = {"model.embed_tokens.weight": matrix(vocab, HIDDEN), "model.norm.weight": np.ones(HIDDEN, np.float32)}
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": matrix(HEADS * HEAD, HIDDEN),
            "self_attn.k_proj": matrix(KV_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": matrix(KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": matrix(HIDDEN, HEADS * HEAD),
            "mlp.gate_proj": matrix(MLP, HIDDEN),
            "mlp.up_proj": matrix(MLP, HIDDEN),
            "mlp.down_proj": matrix(HIDDEN, MLP),
            "input_layernorm": np.ones(HIDDEN, np.float32),
            "post_attention_layernorm": np.ones(HIDDEN, np.float32),
        }
        out.update({f"model.layers.{i}.{name}.weight": value for name, value in layer.items()})
    return out
