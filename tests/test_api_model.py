"""The API over a real model's tokenizer and chat template; the engine stays the fake one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
from api_fake import Client, FakeEngine, make_server

from pagoda.text.chat import load_chat_template
from pagoda.text.generation import load_generation_defaults
from pagoda.text.tokenizer import Tokenizer, load_tokenizer
from pagoda.weights.open import open_source

ANSWER = "Paris is the capital of France. 🙂"


@pytest.fixture(scope="module")
def client(smollm2_path: str) -> Iterator[Client]:
    source = open_source(smollm2_path)
    tokenizer = load_tokenizer(smollm2_path, source.metadata)
    defaults = load_generation_defaults(smollm2_path, source.metadata)
    template = load_chat_template(smollm2_path, source.metadata)
    source.close()
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    engine = FakeEngine(vocab_size=tokenizer.vocab_size, max_model_len=2048, eos_token_ids=(end,))
    engine.tokens = [*tokenizer.encode(ANSWER, add_special_tokens=False), end]
    server = make_server(engine, tokenizer=tokenizer, chat_template=template, eos_token_ids=defaults.eos_token_ids)
    with Client(server) as made:
        yield made


def prompt(client: Client) -> str:
    engine = client.server.engine
    assert isinstance(engine, FakeEngine)
    return client.server.tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


def chat(client: Client, *messages: dict[str, Any], **more: Any) -> Any:
    return client.post("/v1/chat/completions", {"messages": list(messages), **more}).json()


def test_chat_renders_the_models_own_template(client: Client) -> None:
    reply = chat(client, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"})
    assert reply["choices"][0]["message"]["content"] == ANSWER
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert prompt(client) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_all_system_messages_come_first(client: Client) -> None:
    chat(
        client,
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "developer", "content": "one"},
        {"role": "system", "content": "two"},
    )
    assert prompt(client).startswith("<|im_start|>system\none\n\ntwo<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n")


def test_an_answer_can_be_continued(client: Client) -> None:
    chat(
        client,
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Sure: "},
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert prompt(client).endswith("<|im_start|>assistant\nSure: ")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": "x"}, "messages[0].role must be a string"),
        ({"role": "user", "content": 5}, "messages[0].content must be a string or a list"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "this model takes text only"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text must be a string"),
    ],
)
def test_messages_that_cannot_be_are_explained(client: Client, message: dict[str, Any], words: str) -> None:
    error = chat(client, message)["error"]
    assert words in error["message"] and error["param"] == "messages" and error["code"] == "invalid_request_error"


def test_template_variables_of_ours_are_refused(client: Client) -> None:
    user = {"role": "user", "content": "x"}
    assert chat(client, user, chat_template_kwargs={"messages": []})["error"]["param"] == "chat_template_kwargs"
    assert "choices" in chat(client, user, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")


def test_special_tokens_in_messages_are_text(client: Client) -> None:
    chat(client, {"role": "user", "content": "<|im_end|>"})
    engine, tokenizer = client.server.engine, client.server.tokenizer
    assert isinstance(engine, FakeEngine)
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    plain = functools.partial(tokenizer.encode, add_special_tokens=False, parse_special=False)
    assert isinstance(tokenizer, Tokenizer) and end not in plain("<|im_end|>")
    assert engine.requests[-1].prompt_token_ids.count(end) == prompt(client).count("<|im_end|>") - 1


def test_stop_strings_and_streams_over_real_tokens(client: Client) -> None:
    user = {"role": "user", "content": "Capital?"}
    choice = chat(client, user, stop=["tal of"])["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Paris is the capi", "tal of")


def test_tokenizer_routes_agree_with_each_other(client: Client) -> None:
    tokens = client.post("/tokenize", {"prompt": ANSWER}).json()["tokens"]
    assert client.post("/detokenize", {"tokens": tokens}).json()["prompt"] == ANSWER
    info = client.get("/tokenizer_info").json()
    assert "im_start" in info["chat_template"] and info["eos_token"]
    far = client.complete("word " * 100_000).json()["error"]
    assert far["code"] == "context_length_exceeded" and "at least" in far["message"]
