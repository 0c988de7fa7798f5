"""The small JSON files beside a model, and the special tokens that they or a GGUF table name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagoda.errors import ModelError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GGUF_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",  # spelled so in the format
    "pad_token": "tokenizer.ggml.padding_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}

_GPT2_END = "<|endoftext|>"  # what GPT-2's tokenizer takes where its files name no special tokens


def read_text(path: Path) -> str | None:
    """The file's text, None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"cannot read {path}: {e}", remedy="Download the file again") from e


def read_json(model_path: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the model's directory, {} if there is no such file."""
    path = Path(model_path) / name
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not valid JSON: {e}", remedy="Download the file again") from e
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object", remedy="Download the file again")
    return value


def special_tokens(model_path: str | Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the named special tokens (bos_token, eos_token, ...) that the checkpoint declares."""
    if "tokenizer.ggml.tokens" in metadata and not (Path(model_path) / "tokenizer.json").exists():
        tokens = metadata["tokenizer.ggml.tokens"]
        ids = {name: metadata.get(key) for name, key in _GGUF_IDS.items()}
        return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    usual = ("bos_token", "eos_token", "unk_token") if has_merges(model_path) else ()
    found: dict[str, str] = dict.fromkeys(usual, _GPT2_END)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = read_json(model_path, name)
        for key in SPECIAL_NAMES:
            value = values.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                found[key] = text
    return found


def has_merges(model_path: str | Path) -> bool:
    """Is the tokenizer there as GPT-2's vocab.json and merges.txt alone?"""
    folder = Path(model_path)
    files = [(folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    return files == [False, True, True] and read_json(folder, "config.json").get("model_type") == "gpt2"


def id_list(value: Any) -> list[int]:
    """Token ids given as one integer, a list of them, or nothing."""
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def declared_tokens(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The `added_tokens_decoder` of a tokenizer_config.json: id to content and flags."""
    entries = config.get("added_tokens_decoder")
    items = entries.items() if isinstance(entries, dict) else ()
    good = {int(k): v for k, v in items if k.isdecimal() and isinstance(v, dict) and isinstance(v.get("content"), str)}
    return dict(sorted(good.items()))
