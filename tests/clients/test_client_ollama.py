"""The package `ollama`: lists, chat, generate, format, tools, thinking, embed, pull, errors."""

from __future__ import annotations

import json

import ollama
import pytest

HI = [{"role": "user", "content": "Hi"}]


def test_models(chat: str) -> None:
    client = ollama.Client(host=chat, timeout=60)
    assert [each.model for each in client.list().models] == ["smollm2:latest"]
    assert [each.model for each in client.ps().models] == ["smollm2:latest"]
    shown = client.show("smollm2")
    assert "completion" in (shown.capabilities or []) and (shown.modelinfo or {})["llama.context_length"] == 2048
    assert client.pull("smollm2").status == "success"
    with pytest.raises(ollama.ResponseError, match="not found") as caught:
        client.pull("nobody-has-this")
    assert caught.value.status_code == 404


def test_chat_and_generate(chat: str) -> None:
    client = ollama.Client(host=chat, timeout=120)
    options = {"temperature": 0, "num_predict": 12}
    whole = client.chat("smollm2", HI, options=options, keep_alive=-1, think=False)
    parts = list(client.chat("smollm2:latest", HI, options=options, stream=True))
    assert whole.message.content == "".join(part.message.content or "" for part in parts)
    assert parts[-1].eval_count == whole.eval_count and (parts[-1].total_duration or 0) > 0
    said = client.generate("smollm2", "The capital of France is", raw=True, options=options)
    assert said.response.startswith(" Paris") and said.done_reason == "length"
    schema = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    formed = client.chat("smollm2", HI, format=schema, options={"num_predict": 60})
    assert json.loads(formed.message.content or "")["unit"] in ("C", "F")


def test_thinking_and_tools(agent: str) -> None:
    def add(a: int, b: str = "") -> int:
        """Add.

        Args:
            a: a number
            b: a word
        """
        return a

    for stream in (False, True):
        replied = ollama.Client(host=agent, timeout=60).chat("fake-model", HI, tools=[add], stream=stream)
        parts = list(replied) if stream else [replied]
        calls = [call.function for part in parts for call in part.message.tool_calls or []]
        assert [(call.name, call.arguments) for call in calls] == [("add", {"a": 1, "b": "ö"}), ("add", {"a": 2})]
        assert "".join(part.message.thinking or "" for part in parts) == "Let me see."


def test_embed(minilm: str) -> None:
    found = ollama.Client(host=minilm, timeout=60).embed("minilm", ["a cat", "a dog"], keep_alive=-1.0)
    assert [len(each) for each in found.embeddings] == [384, 384] and (found.prompt_eval_count or 0) > 4


def test_a_picture(eyes: str, blue: str) -> None:
    client, options = ollama.Client(host=eyes, timeout=120), {"temperature": 0, "num_predict": 8}
    assert "vision" in (client.show("eyes").capabilities or [])
    message = {"role": "user", "content": "What colour is this?", "images": [blue]}
    assert (client.chat("eyes", [message], options=options).message.content or "").strip() == "blue"
    made = client.generate("eyes", "What colour is this?", images=[blue], options=options)
    assert made.response.strip() == "blue"
