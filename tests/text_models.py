"""Small tokenizers for the tests of floor `text`, trained or written down here."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from pagoda.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what we'll do, they've said 12345 times.",
    "def add(first, second):\n    return first + second  # the sum\n\n\nclass Fox(Dog):\n\tpass\n",
    "你好，世界！今天天气很好，我们去公园散步吧。人工智能正在改变世界。",
    "Ünïcödé café naïve größe Straße — “quotes” … ½ ١٢٣ 😀👩‍👩‍👧 🇨🇳 résumé résumé",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "  lead and trail  ",
    "a\r\n\r\n b\t\tc\n",
    "3.14159 2718281828 x1y2",
    "cafe\u0301 \u00a0\u3000 \ufeffbom",
    "\x00\x01 control \x7f",
    "𝔘𝔫𝔦 🤷🏽‍♀️ ﷽ ͏zalgo̷̡",
    "WHAT'S they'LL we'Re DON'T",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def trained_json(split: str = "") -> str:
    """A byte-level BPE tokenizer.json over the corpus. `split`: a pattern to cut by, else GPT-2's."""
    backend = tokenizers.Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIALS, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return backend.to_str()


def write_model(directory: Path, tokenizer_json: str | None = None, **config: Any) -> Path:
    """A model directory with a tokenizer; `config` goes into tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json or trained_json(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def with_bos(tokenizer_json: str) -> str:
    """The same tokenizer, putting <|endoftext|> before every text."""
    backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    bos = "<|endoftext|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend.to_str()


def gguf_byte_metadata(tokenizer_json: str | None = None, pre: str = "gpt-2") -> dict[str, Any]:
    """The GGUF table that a converter would write for a tokenizer.json."""
    data = json.loads(tokenizer_json or trained_json())
    vocab = data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [1] * len(tokens)
    for token in data["added_tokens"]:
        types[token["id"]] = 3 if token["special"] else 4
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in data["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": vocab["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|im_end|>"],
        "tokenizer.ggml.add_bos_token": False,
    }


def gguf_space_metadata(**more: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary with byte tokens: every substring of some words, scored by length and place."""
    words = ["▁hello", "▁world", "▁the", "ing", "▁café", "你好", "世界", "▁▁", "hel", "low", "▁a"]
    parts = {word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)}
    pieces = sorted(parts, key=lambda p: (-len(p), p))
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", "<think>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [2, 3, 3, 3, 4] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * (5 + 256) + [-float(i) for i in range(len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | more


@cache
def byte_tokenizer() -> Tokenizer:
    return load_tokenizer("model.gguf", gguf_byte_metadata())


@cache
def space_tokenizer() -> Tokenizer:
    return load_tokenizer("model.gguf", gguf_space_metadata())
