"""What a checkpoint recommends for generating: sampling values, and the tokens that end an answer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.errors import PagodaError
from pagoda.text import harmony
from pagoda.text.chat import ChatTemplate, load_chat_template
from pagoda.text.files import declared_tokens, id_list, read_json, special_tokens
from pagoda.text.reasoning import HARMONY, find_reasoning

log = logging.getLogger(__name__)

_HF_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_GGUF_NAMES = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_INTEGERS = ("top_k", "max_tokens")
_GGUF_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<turn|>")
_GEMMA4_CALL, _GEMMA4_CALLED = "<|tool_call>", "<|tool_response>"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`params` are values of SamplingParams for requests that give none; `eos_token_ids` end an answer."""

    params: dict[str, float | int]
    eos_token_ids: tuple[int, ...]


def load_generation_defaults(model_path: str, metadata: Mapping[str, Any]) -> GenerationDefaults:
    """Read generation_config.json, config.json and the tokenizer's files, or the GGUF table."""
    generation = read_json(model_path, "generation_config.json")
    params = _numbers(metadata, {"general.sampling." + key: name for key, name in _GGUF_NAMES.items()})
    params |= _numbers(generation, _HF_NAMES)
    return GenerationDefaults(params, _end_ids(model_path, metadata, generation))


def _numbers(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for key, name in names.items():
        value = values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            found[name] = int(value) if name in _INTEGERS else float(value)
    return found


def _end_ids(model_path: str, metadata: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    config = read_json(model_path, "config.json")
    text_config = config.get("text_config")
    ids = id_list(generation.get("eos_token_id")) + id_list(config.get("eos_token_id"))
    ids += id_list(text_config.get("eos_token_id")) if isinstance(text_config, dict) else []
    for key in _GGUF_END_KEYS:
        ids += id_list(metadata.get("tokenizer.ggml." + key))
    texts = [special_tokens(model_path, metadata).get("eos_token"), *_turn_ends(model_path, metadata)]
    ids += _find_ids(model_path, metadata, [text for text in texts if text])
    return tuple(dict.fromkeys(ids))


def _turn_ends(model_path: str, metadata: Mapping[str, Any]) -> Sequence[str | None]:
    """The known tokens that the chat template writes behind an answer, if it does."""
    try:
        template = load_chat_template(model_path, metadata)
        if template is None:
            return ()
        # a GGUF file names one token alone, and a call would not end
        if find_reasoning(template.source) is HARMONY:
            return harmony.ENDS
        called = _GEMMA4_CALLED if _GEMMA4_CALL in template.all_source else None
        return (find_turn_end(template), called)
    except PagodaError as e:  # whoever needs the template reports what is wrong with it
        log.info("no end of turn was read from the chat template: %s", e)
        return ()


def find_turn_end(template: ChatTemplate) -> str | None:
    """Render a question and its answer, and look at what stands behind the answer."""
    answer = "The answer."
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    behind = template.render(messages, add_generation_prompt=False).rpartition(answer)[2].lstrip()
    return next((text for text in _TURN_ENDS if behind.startswith(text)), None)


def _find_ids(model_path: str, metadata: Mapping[str, Any], texts: Sequence[str]) -> list[int]:
    """Ids of special tokens given by their text; those the vocabulary lacks are left out."""
    if not texts:
        return []
    if not (Path(model_path) / "tokenizer.json").exists():
        tokens = metadata.get("tokenizer.ggml.tokens") or []
        return [tokens.index(text) for text in texts if text in tokens]
    declared = declared_tokens(read_json(model_path, "tokenizer_config.json"))
    ids = {token["content"]: i for i, token in declared.items()}
    if not all(text in ids for text in texts):
        added = read_json(model_path, "tokenizer.json").get("added_tokens")
        entries = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        ids |= {token["content"]: token["id"] for token in entries if id_list(token.get("id")) and "content" in token}
    return [ids[text] for text in texts if text in ids]
