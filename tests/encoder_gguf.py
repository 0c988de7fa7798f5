"""Writes encoders as GGUF, as llama.cpp's converter does: its keys, its names, and the vocabulary in its form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import transformers
from gguf_writer import write_gguf
from safetensors.numpy import load_file

_ARCHS = {
    "bert": "bert",
    "xlm-roberta": "bert",
    "nomic_bert": "nomic-bert",
    "jina_embeddings_v3": "jina-bert-v3",
    "modernbert": "modern-bert",
    "gemma3_text": "gemma-embedding",
}
_CONTROL, _NORMAL = 3, 1


def write_encoder(path: Path, folder: Path, type: str = "F32", **metadata: Any) -> None:
    """The checkpoint in a folder as a GGUF file, its matrices in `type`. `metadata`: keys of the architecture."""
    config = json.loads((folder / "config.json").read_text())
    arch = _ARCHS[config["model_type"]]
    first = config["pad_token_id"] + 1 if config["model_type"] == "xlm-roberta" else 0
    names = gguf.get_tensor_name_map(_arch_of(arch), config["num_hidden_layers"])
    stored = load_file(folder / "model.safetensors")
    for dense in folder.glob("*_Dense"):
        number = dense.name.partition("_")[0]
        stored |= {f"dense_{number}.weight": load_file(dense / "model.safetensors")["linear.weight"]}
    tensors: dict[str, Any] = {}
    for name, values in stored.items():
        name = name.removeprefix("bert.").removeprefix("roberta.").removeprefix("model.")
        name = re.sub(r"^classifier\.(weight|bias)", r"classifier.out_proj.\1", name)
        if name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias")) or names.get_name(
            f"model.{name}", try_suffixes=(".weight", ".bias")
        )
        assert found, name
        values = values[first:] if found == "position_embd.weight" else values
        values = values + 1 if arch == "gemma-embedding" and found.endswith("norm.weight") else values
        tensors[found] = (values, type) if values.ndim == 2 and "embd" not in found else values
    write_gguf(path, {**_table(arch, config, first), **_keys(arch, metadata), **vocabulary(folder)}, tensors)


def _arch_of(arch: str) -> gguf.MODEL_ARCH:
    return next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def _keys(arch: str, table: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{arch}.{name.replace('__', '.')}": value for name, value in table.items()}


def _table(arch: str, config: Mapping[str, Any], first: int) -> dict[str, Any]:
    eps = next(config[name] for name in ("layer_norm_eps", "norm_eps", "rms_norm_eps") if name in config)
    table: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"] - first,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_epsilon": float(eps),
        "attention.layer_norm_rms_epsilon": float(eps),
        "attention.causal": False,
    }
    if arch == "gemma-embedding":
        table |= {"attention.head_count_kv": config["num_key_value_heads"], "attention.key_length": config["head_dim"]}
        table |= {"attention.value_length": config["head_dim"], "attention.sliding_window": config["sliding_window"]}
    if arch == "modern-bert":
        table |= {"attention.sliding_window": config["local_attention"]}
    if "layer_types" in config:
        table["attention.sliding_window_pattern"] = config["layer_types"].index("full_attention", 1) + (arch[0] == "g")
    recipe = config.get("rope_parameters") or {}
    near = recipe.get("sliding_attention")
    if recipe:
        table["rope.freq_base"] = float(recipe.get("full_attention", recipe)["rope_theta"])
    if near:
        table["rope.freq_base_swa"] = float(near["rope_theta"])
    return {"general.architecture": arch} | {f"{arch}.{name}": value for name, value in table.items()}


def vocabulary(folder: Path) -> dict[str, Any]:
    """Of a tokenizer.json of WordPiece or Unigram; nothing for one of another kind."""
    file = json.loads((folder / "tokenizer.json").read_text())
    kind = file["model"].get("type")
    if kind not in ("WordPiece", "Unigram"):
        return {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    added = tokenizer.get_added_vocab()
    types = [_CONTROL if token in added else _NORMAL for token in tokens]
    ids = {
        "bos": "bos",
        "eos": "eos",
        "unknown": "unk",
        "seperator": "sep",
        "padding": "pad",
        "cls": "cls",
        "mask": "mask",
    }
    table: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": getattr(tokenizer, f"{attr}_token_id") for name, attr in ids.items()
    }
    table = {name: value for name, value in table.items() if value is not None}
    table["tokenizer.ggml.token_type"] = types
    if kind == "WordPiece":
        spelled = [
            t if types[i] == _CONTROL else t.removeprefix("##") if t.startswith("##") else f"▁{t}"
            for i, t in enumerate(tokens)
        ]
        return {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": spelled, **table}
    scores = [float(score) for _, score in file["model"]["vocab"]]
    return {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores, **table}
