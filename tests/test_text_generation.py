"""Defaults that a checkpoint gives: sampling values and the ids that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_models import CHATML, gguf_byte_metadata, write_model

from pagoda.errors import ModelError
from pagoda.text.generation import load_generation_defaults
from pagoda.types import SamplingParams
from pagoda.weights.open import open_source


def write(directory: Path, name: str, **values: Any) -> None:
    (directory / name).write_text(json.dumps(values))


def test_values_of_generation_config(tmp_path: Path) -> None:
    values = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "repetition_penalty": 1.1}
    write(tmp_path, "generation_config.json", do_sample=False, max_new_tokens=512, transformers_version="5", **values)
    defaults = load_generation_defaults(str(tmp_path), {})
    assert defaults.params == values | {"max_tokens": 512}
    SamplingParams(**defaults.params).check(100)  # type: ignore[arg-type]
    assert defaults.eos_token_ids == ()


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    values = f'"temperature": null, "top_p": "1", "top_k": true, "min_p": NaN, "max_new_tokens": 1{"0" * 400}'
    (tmp_path / "generation_config.json").write_text(f"{{{values}}}")
    assert load_generation_defaults(str(tmp_path), {}).params == {}


def test_values_of_gguf() -> None:
    metadata = {"general.sampling.temp": 0.7, "general.sampling.top_k": 40, "general.sampling.penalty_repeat": 1.05}
    defaults = load_generation_defaults("m.gguf", metadata)
    assert defaults.params == {"temperature": 0.7, "top_k": 40, "repetition_penalty": 1.05}


def test_ids_from_all_files_come_together(tmp_path: Path) -> None:
    write_model(tmp_path, eos_token="<|endoftext|>")
    write(tmp_path, "generation_config.json", eos_token_id=[7, 8])
    write(tmp_path, "config.json", eos_token_id=8, text_config={"eos_token_id": 9})
    assert load_generation_defaults(str(tmp_path), {}).eos_token_ids == (7, 8, 9, 0)


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        (CHATML, (0, 2)),
        ("{% for m in messages %}{{ m.content }}\n<|im_end|>{% endfor %}", (0, 2)),
        ("{% for m in messages %}<|im_end|>{{ m.content }}</turn>{% endfor %}", (0,)),
        ("{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", (0,)),
        ("{{ raise_exception('no') }}<|im_end|>", (0,)),
        ("{% broken <|im_end|>", (0,)),
    ],
)
def test_the_end_of_a_turn_is_read_from_the_template(tmp_path: Path, template: str, ids: tuple[int, ...]) -> None:
    write_model(tmp_path, eos_token="<|endoftext|>", chat_template=template)
    assert load_generation_defaults(str(tmp_path), {}).eos_token_ids == ids
    metadata = gguf_byte_metadata() | {"tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": template}
    assert load_generation_defaults("m.gguf", metadata).eos_token_ids == ids


def test_gguf_ends() -> None:
    metadata = gguf_byte_metadata() | {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    assert load_generation_defaults("m.gguf", metadata).eos_token_ids == (2, 5, 6)


def test_calls_of_gemma_4_end_the_answer_though_its_file_names_one_token() -> None:
    metadata = gguf_byte_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], "<turn|>", "<|tool_response>"]
    template = "{% for m in messages %}{{ m.content }}<turn|>{% endfor %}{% if tools %}<|tool_call>{% endif %}"
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.chat_template": template}
    turn, called = len(tokens) - 2, len(tokens) - 1
    assert load_generation_defaults("m.gguf", metadata).eos_token_ids == (2, turn, called)
    metadata["tokenizer.chat_template"] = template.replace("<|tool_call>", "")
    assert load_generation_defaults("m.gguf", metadata).eos_token_ids == (2, turn)


def test_smollm2(smollm2_path: str) -> None:
    defaults = load_generation_defaults(smollm2_path, open_source(smollm2_path).metadata)
    assert (defaults.params, defaults.eos_token_ids) == ({}, (2,))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"generation_config\.json must hold a JSON object"):
        load_generation_defaults(str(tmp_path), {})
