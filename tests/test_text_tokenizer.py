"""Tokenizer from tokenizer.json, against transformers on the same files."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from text_models import LLAMA3_SPLIT, SPECIALS, TEXTS, byte_tokenizer, trained_json, with_bos, write_model
from transformers import AutoTokenizer

from pagoda.errors import BadRequest, ModelError
from pagoda.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("split", ["", LLAMA3_SPLIT])
def test_encodes_and_decodes_as_transformers(tmp_path: Path, split: str) -> None:
    directory = write_model(tmp_path, trained_json(split))
    ours, theirs = load_tokenizer(str(directory), {}), AutoTokenizer.from_pretrained(directory)
    assert ours.vocab_size == len(theirs)
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n<think>x</think>"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_every_token_has_its_bytes(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    ours, backend = (
        load_tokenizer(str(directory), {}),
        tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")),
    )
    for i in range(ours.vocab_size):
        assert ours.token_bytes(i).decode("utf-8", "replace") == backend.decode([i], skip_special_tokens=False)
        assert ours.token_text(i) == ours.token_bytes(i).decode("utf-8", "replace")
    for i in (ours.vocab_size, 10**6, 2**32, 10**30, -1):
        assert ours.token_bytes(i) == b""


@pytest.mark.parametrize("file_bos", [False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("add_eos", [None, True])
def test_bos_and_eos_as_the_files_say(
    tmp_path: Path, file_bos: bool, add_bos: bool | None, add_eos: bool | None
) -> None:
    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    config = {k: v for k, v in flags.items() if v is not None} | {"bos_token": "<|endoftext|>"}
    tokenizer_json = with_bos(trained_json()) if file_bos else trained_json()
    tokenizer = load_tokenizer(str(write_model(tmp_path, tokenizer_json, **config)), {})
    plain = tokenizer.encode("Hi", add_special_tokens=False)
    has_bos = file_bos if add_bos is None else add_bos
    assert tokenizer.prefix_ids == ([0] if has_bos else [])
    assert tokenizer.encode("Hi") == ([0] if has_bos else []) + plain + ([2] if add_eos else [])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (2,))


def test_special_tokens_declared_outside_tokenizer_json(tmp_path: Path) -> None:
    size = len(json.loads(trained_json())["model"]["vocab"]) + 2
    declared = {str(size): {"content": "<|tool|>", "special": True}, str(size + 9): {"content": "<|gap|>"}}
    write_model(tmp_path, added_tokens_decoder=declared)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "dog"}}))
    tokenizer = load_tokenizer(str(tmp_path), {})
    assert tokenizer.encode("<|tool|>") == [size]
    assert size in tokenizer.special_ids
    assert len(tokenizer.encode("<|gap|>")) > 1


def test_ids_of_config_json_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained_json())
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [2, 1]}))
    tokenizer = load_tokenizer(str(tmp_path), {})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (2, 1))


@pytest.mark.parametrize("literal", SPECIALS)
def test_literals_are_plain_text_without_parse_special(literal: str) -> None:
    tokenizer = byte_tokenizer()
    text = f"a{literal} <think>b"
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<think>")[0] in ids  # not special: a word of the vocabulary
    assert tokenizer.special_ids.intersection(tokenizer.encode(text))


def test_both_readings_share_the_ids_of_added_tokens(tmp_path: Path) -> None:
    """The ids behind the vocabulary must be the same where special tokens among them are read as text."""
    data = json.loads(trained_json())
    added = ["<|a|>", "<b>", "<|c|>", "<d>"]
    size = data["added_tokens"][-1]["id"] + 1
    for i, content in enumerate(added):
        data["added_tokens"].append(
            data["added_tokens"][0] | {"content": content, "id": size + i, "special": i % 2 == 0}
        )
    tokenizer = load_tokenizer(str(write_model(tmp_path, json.dumps(data))), {})
    assert tokenizer.encode("".join(added)) == [size, size + 1, size + 2, size + 3]
    assert tokenizer.encode("<b><d>", parse_special=False) == [size + 1, size + 3]
    text = "".join(added)
    ids = tokenizer.encode(text, parse_special=False)
    assert {size, size + 2}.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\udc00\ud800 later"])
def test_surrogates_are_a_bad_request(text: str) -> None:
    where = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    with pytest.raises(BadRequest, match=f"character {where}"):
        byte_tokenizer().encode(text)


def test_encoding_in_threads_with_both_readings() -> None:
    tokenizer = byte_tokenizer()
    text = "hello <|im_end|> world " * 20
    expected = {parse: tokenizer.encode(text, parse_special=parse) for parse in (True, False)}
    with ThreadPoolExecutor(8) as pool:
        jobs = [(i % 2 == 0, pool.submit(tokenizer.encode, text, parse_special=i % 2 == 0)) for i in range(400)]
    assert all(job.result() == expected[parse] for parse, job in jobs)
    assert expected[True] != expected[False]


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path), {})
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelError, match="save_pretrained"):
        load_tokenizer(str(tmp_path), {})
    for broken in ("{", "[]", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ModelError, match=r"cannot read .*tokenizer\.json"):
            load_tokenizer(str(tmp_path), {})
    write_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(str(tmp_path), {})


def test_an_unknown_decoder_encodes_but_does_not_decode(tmp_path: Path) -> None:
    data = json.loads(trained_json()) | {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}
    tokenizer = load_tokenizer(str(write_model(tmp_path, json.dumps(data))), {})
    ids = tokenizer.encode("hello")
    with pytest.raises(ModelError, match="decoder"):
        tokenizer.decode(ids)


def test_a_long_text_leaves_the_interpreter_to_others(tmp_path: Path) -> None:
    """Streams go on while a prompt of a megabyte is encoded in a thread: the GIL is free meanwhile."""
    tokenizer = load_tokenizer(str(write_model(tmp_path)), {})

    def encode() -> float:
        started_s = time.thread_time()
        tokenizer.encode("all of it, word for word, " * 40_000)
        return time.thread_time() - started_s

    with ThreadPoolExecutor(1) as pool:
        encoding, started_s = pool.submit(encode), time.thread_time()
        while not encoding.done():
            pass
        ours_s = time.thread_time() - started_s
    assert ours_s > 0.25 * encoding.result()
