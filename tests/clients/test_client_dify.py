"""dify_plugin's three classes for servers like OpenAI's, on which Dify's plugins are built: LLM, embedding, rerank."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dify_plugin.entities.model.message import PromptMessageTool, SystemPromptMessage, UserPromptMessage
from dify_plugin.interfaces.model.ai_model import AIModel
from dify_plugin.interfaces.model.openai_compatible.llm import OAICompatLargeLanguageModel
from dify_plugin.interfaces.model.openai_compatible.rerank import OAICompatRerankModel
from dify_plugin.interfaces.model.openai_compatible.text_embedding import OAICompatEmbeddingModel

HI = [SystemPromptMessage(content="Be kind."), UserPromptMessage(content="Hi")]
ADD = PromptMessageTool(name="add", description="adds", parameters={"type": "object", "properties": {}, "required": []})


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts with GPT-2's tokenizer, which it would fetch."""
    monkeypatch.setattr(AIModel, "_get_num_tokens_by_gpt2", lambda self, text: len(text))


def credentials(url: str, **more: str) -> dict[str, str]:
    return {"endpoint_url": url + "/v1", "mode": "chat", "context_size": "2048", **more}


def ask(url: str, model: str, stream: bool, **more: Any) -> tuple[str, list[Any], str | None, Any]:
    """Text, tool calls, the reason of the end, usage."""
    replied = OAICompatLargeLanguageModel(model_schemas=[]).invoke(
        model=model,
        credentials=credentials(url, function_calling_type="tool_call"),
        prompt_messages=HI,
        model_parameters={"temperature": 0, "max_tokens": more.pop("max_tokens", 12)},
        stream=stream,
        user="u",
        **more,
    )
    parts = list(replied)
    text = "".join(str(part.delta.message.content or "") for part in parts)
    calls = [call for part in parts for call in part.delta.message.tool_calls]
    return text, calls, parts[-1].delta.finish_reason, parts[-1].delta.usage


@pytest.mark.parametrize("more", [{}, {"api_key": "any"}, {"mode": "completion"}, {"endpoint_model_name": "smollm2"}])
def test_saving_a_model_validates_it(chat: str, more: dict[str, str]) -> None:
    model = "named-otherwise" if "endpoint_model_name" in more else "smollm2"
    OAICompatLargeLanguageModel(model_schemas=[]).validate_credentials(model, credentials(chat, **more))


def test_answers_are_the_same_whole_and_streamed(chat: str) -> None:
    whole, streamed = ask(chat, "smollm2", False), ask(chat, "smollm2", True)
    assert whole[0] == streamed[0] != ""
    assert streamed[2] in ("stop", "length") and streamed[3].completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_calls_stay_apart(agent: str, stream: bool) -> None:
    text, calls, reason, _ = ask(agent, "fake-model", stream, tools=[ADD], max_tokens=400)
    assert "I add." in text and ("Let me see." in text or not stream)
    assert [call.function.name for call in calls] == ["add", "add"] and len({call.id for call in calls}) == 2
    assert [json.loads(call.function.arguments) for call in calls] == [{"a": 1, "b": "ö"}, {"a": 2}]
    assert reason in ("tool_calls", None)


def test_an_object(chat: str) -> None:
    schema = {"schema": {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}}
    replied = OAICompatLargeLanguageModel(model_schemas=[])._invoke(  # as plugins that have this parameter call it
        model="smollm2",
        credentials=credentials(chat),
        prompt_messages=HI,
        model_parameters={
            "response_format": "json_schema",
            "json_schema": json.dumps({**schema, "name": "llm_response"}),
            "max_tokens": 60,
        },
        stream=True,
    )
    text = "".join(str(part.delta.message.content or "") for part in replied)
    assert json.loads(text)["unit"] in ("C", "F")


def test_embedding(minilm: str) -> None:
    model = OAICompatEmbeddingModel(model_schemas=[])
    model.validate_credentials("minilm", credentials(minilm))
    made = model.invoke("minilm", credentials(minilm), ["a cat", "a dog"])
    again = model.invoke("minilm", credentials(minilm), ["a dog"])
    assert [len(each) for each in made.embeddings] == [384, 384] and made.usage.tokens > 0
    assert made.embeddings[1] == pytest.approx(again.embeddings[0])


@pytest.mark.parametrize("base", ["", "/v1"])
def test_rerank(minilm: str, base: str) -> None:
    """The validation sends `top_n: null` and, without a key, `Authorization: Bearer None`."""
    model = OAICompatRerankModel(model_schemas=[])
    given = {"endpoint_url": minilm + base}
    model.validate_credentials("minilm", given)
    found = model.invoke("minilm", given, "What does a cat eat?", ["A tower.", "Cats like milk.", "Stone."], top_n=2)
    assert [each.index for each in found.docs][:1] == [1] and len(found.docs) == 2
