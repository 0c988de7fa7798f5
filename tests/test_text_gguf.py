"""The tokenizer rebuilt from GGUF metadata: against tokenizer.json, transformers, gguf and a plain SentencePiece."""

from __future__ import annotations

import json
import logging
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from text_models import CORPUS, LLAMA3_SPLIT, TEXTS, gguf_byte_metadata, gguf_space_metadata, trained_json, write_model
from transformers import AutoTokenizer

from pagoda.errors import ModelError
from pagoda.text import gguf_vocab
from pagoda.text.gguf_vocab import build_gguf_vocab
from pagoda.text.pieces import byte_characters
from pagoda.text.tokenizer import Tokenizer, load_tokenizer
from pagoda.weights.open import open_source


@pytest.fixture(scope="module")
def theirs(smollm2_path: str) -> Any:
    """What transformers makes of the file."""
    path = Path(smollm2_path)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: str) -> Tokenizer:
    return load_tokenizer(smollm2_path, open_source(smollm2_path).metadata)


def test_smollm2_has_the_vocabulary_of_the_file(smollm2: Tokenizer, theirs: Any) -> None:
    raw = [token.encode() for token in theirs.convert_ids_to_tokens(range(len(theirs)))]
    to_byte = {char: byte for byte, char in byte_characters().items()}
    assert smollm2.vocab_size == len(raw) == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_ids) == (1, (2,))
    assert smollm2.special_ids == frozenset(range(17))
    for i, token in enumerate(raw):
        expected = token if i < 17 else bytes(to_byte[char] for char in token.decode())
        assert smollm2.token_bytes(i) == expected


def test_smollm2_encodes_as_transformers(smollm2: Tokenizer, theirs: Any) -> None:
    # transformers forgets that this family splits digits: right for ASCII ones, which never merge, only.
    for text in [t for t in TEXTS if not any(c.isnumeric() and not c.isascii() for c in t)]:
        ids = smollm2.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert smollm2.decode(ids) == theirs.decode(ids) == text
    assert smollm2.encode("x ½ ١٢") == smollm2.encode("x ") + [i for c in "½ ١٢" for i in smollm2.encode(c)]


@pytest.mark.parametrize(("pre", "split"), [("gpt-2", ""), ("llama-bpe", LLAMA3_SPLIT), ("smaug-bpe", LLAMA3_SPLIT)])
def test_same_ids_as_the_tokenizer_json_it_came_from(tmp_path: Path, pre: str, split: str) -> None:
    data = json.loads(trained_json(split))
    data["model"]["ignore_merges"] = pre == "llama-bpe"
    original = load_tokenizer(str(write_model(tmp_path, json.dumps(data))), {})
    rebuilt = load_tokenizer("m.gguf", gguf_byte_metadata(trained_json(split), pre))
    for text in [*TEXTS, "<|im_start|>user<|im_end|><think>\n"]:
        for parse in (True, False):
            ids = rebuilt.encode(text, parse_special=parse)
            assert ids == original.encode(text, parse_special=parse)
            assert rebuilt.decode(ids, skip_special_tokens=False) == text
    assert rebuilt.special_ids == original.special_ids


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 12345 a\n\n b", ["it", "'s", " 12345", " a", "\n\n", " b"]),
        ("smollm", "x 123 ½", ["x", " ", "1", "2", "3", " ", "½"]),
        ("qwen2", "IT'S 123\n\nx", ["IT", "'S", " ", "1", "2", "3", "\n\n", "x"]),
        ("llama-bpe", "IT'S 12345 (x)", ["IT", "'S", " ", "123", "45", " (", "x", ")"]),
        ("tekken", "HelloWorld 12/\n", ["Hello", "World", " ", "1", "2", "/\n"]),
        ("gpt-4o", "it's HelloWorld 1234", ["it's", " Hello", "World", " ", "123", "4"]),
        ("minimax-m2", "it's HelloWorld 1234", ["it's", " Hello", "World", " ", "123", "4"]),
        ("kimi-k2", "Hello你好World's 1234", ["Hello", "你好", "World's", " ", "123", "4"]),
        ("bailingmoe2", "it's 42\n\n\nso", ["it", "'s", " ", "4", "2", "\n\n\n", "so"]),
        ("exaone-moe", "it's 한국어 글 12", ["it", "'s", " 한국어 글", " ", "1", "2"]),
        ("deepseek-coder", "a b!\n你好12", ["a", " b", "!", "\n", "你好", "1", "2"]),
        ("deepseek-llm", "Straße a! 12你好", ["Stra", "ß", "e", " a", "!", " ", "12", "你好"]),
        ("deepseek-v3", "a+b 1234你好!", ["a", "+b", " ", "123", "4", "你好", "!"]),
        ("qwen35", "e\u0301a 12", ["\u00e9a", " ", "1", "2"]),
    ],
)
def test_how_families_cut(pre: str, text: str, pieces: list[str]) -> None:
    backend = build_gguf_vocab(gguf_byte_metadata(pre=pre)).backend
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    cuts = backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in cuts] == pieces


def test_a_whole_word_of_the_vocabulary_may_ignore_the_merges() -> None:
    metadata = gguf_byte_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "xqzjw"]  # no merge leads to it
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    for pre, whole in (("llama-bpe", True), ("glm4", True), ("gpt-2", False), ("qwen2", False)):
        ids = load_tokenizer("m.gguf", metadata | {"tokenizer.ggml.pre": pre}).encode("xqzjw", add_special_tokens=False)
        assert (ids == [last]) == whole


def test_an_unknown_family_is_read_as_gpt2_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer("m.gguf", gguf_byte_metadata(pre="nobody-knows"))
    assert len(caplog.records) == 1
    assert "nobody-knows" in caplog.text
    assert tokenizer.encode(TEXTS[0]) == load_tokenizer("m.gguf", gguf_byte_metadata()).encode(TEXTS[0])


def reference_sentencepiece(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece as it is told: merge the best-scoring neighbours until none is left; bytes for the rest."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    normal = {token: i for i, token in enumerate(tokens) if types[i] == 1}
    parts = list(("▁" if text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[normal[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in normal]
        if not pairs:
            break
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [normal[part]] if part in normal else [tokens.index(f"<0x{b:02X}>") for b in part.encode()]
    return ids


def test_sentencepiece_merges_by_score() -> None:
    metadata = gguf_space_metadata()
    tokenizer = load_tokenizer("m.gguf", metadata)
    rng = random.Random(7)
    words = ["hello", "world", "the", "following", "café", "你好世界", "  ", "ähm", "😀", "hell", "a", "\n"]
    texts = [*TEXTS, *(" ".join(rng.choices(words, k=8)) for _ in range(200))]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference_sentencepiece(metadata, text)
        assert tokenizer.decode(ids) == text


def test_gemma_4_merges_lines_without_their_ends() -> None:
    plain = gguf_space_metadata(**{"tokenizer.ggml.add_space_prefix": False})
    tokens = plain["tokenizer.ggml.tokens"]
    merges = gguf_vocab._merges_of_scores(tokens, plain["tokenizer.ggml.token_type"], plain["tokenizer.ggml.scores"])
    words = {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges]}
    tokenizer = load_tokenizer("m.gguf", plain | words | {"tokenizer.ggml.add_bos_token": False})
    assert tokenizer.prefix_ids == [1]  # whatever the file says
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    theirs.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    for text in (*TEXTS, " hello\n\nworld \n the", "ähm\n"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text).ids
        assert tokenizer.decode(ids) == text


def test_sentencepiece_flags() -> None:
    tokenizer = load_tokenizer("m.gguf", gguf_space_metadata())
    assert tokenizer.prefix_ids == [1]  # the format's default
    assert tokenizer.encode("hello") == [1, *tokenizer.encode(" hello")[2:]]
    assert tokenizer.encode("<|im_end|><think>", add_special_tokens=False) == [3, 4]
    assert tokenizer.special_ids.isdisjoint(
        tokenizer.encode("</s><unk>", add_special_tokens=False, parse_special=False)
    )
    bare = gguf_space_metadata(**{f"tokenizer.ggml.{k}": False for k in ("add_bos_token", "add_space_prefix")})
    tokenizer = load_tokenizer("m.gguf", bare | {"tokenizer.ggml.add_eos_token": True})
    ids = tokenizer.encode("hello")
    assert (ids[-1], tokenizer.prefix_ids) == (2, [])
    assert tokenizer.token_text(ids[0]) == "hello"
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["no such"]}, "vocabulary is broken"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types"),
        ({"tokenizer.ggml.token_type": 1}, "token_type in the GGUF file is no list"),
        ({"tokenizer.ggml.model": "rwkv"}, "'rwkv'"),
        ({"tokenizer.ggml.model": "llama"}, "lacks tokenizer.ggml.scores"),
    ],
)
def test_what_a_broken_table_lacks_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_tokenizer("m.gguf", gguf_byte_metadata() | change)


def test_types_are_guessed_where_the_table_has_none() -> None:
    metadata = gguf_byte_metadata()
    del metadata["tokenizer.ggml.token_type"]
    assert load_tokenizer("m.gguf", metadata).special_ids == {0, 2}


def test_a_large_vocabulary_is_built_fast() -> None:
    """151k tokens as Qwen has them. The target is 600 ms on a free machine; the test allows for a busy one."""
    alphabet = list(byte_characters().values())
    tokens, merges = list(alphabet), []
    for left in tokens:  # grows while it is walked
        merges += [f"{left} {right}" for right in alphabet]
        tokens += [left + right for right in alphabet]
        if len(tokens) > 151_000:
            break
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    start = time.process_time()
    tokenizer = load_tokenizer("m.gguf", metadata)
    assert time.process_time() - start < 1.5
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
