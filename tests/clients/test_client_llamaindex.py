"""LlamaIndex: OpenAILike for chat, completion and tools, embeddings, and its Ollama class."""

from __future__ import annotations

from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike

HI = [ChatMessage(role="user", content="Hi")]


def like(url: str, model: str = "smollm2", **more: Any) -> OpenAILike:
    options: dict[str, Any] = {"is_chat_model": True, "context_window": 2048, "max_retries": 0, **more}
    return OpenAILike(model=model, api_base=url + "/v1", api_key="fake", temperature=0, **options)


def add(a: int, b: str = "") -> int:
    """Add."""
    return a


def test_chat(chat: str) -> None:
    model = like(chat, max_tokens=12)
    whole = model.chat(HI).message.content
    assert whole and "".join(piece.delta or "" for piece in model.stream_chat(HI)) == whole


def test_completion_is_not_cut_at_16_tokens(chat: str) -> None:
    """It sends no limit to /v1/completions, where OpenAI's default is 16."""
    said = like(chat, is_chat_model=False).complete("One, two, three, four,", stop=["\n"])
    assert said.raw is not None and said.raw.usage.completion_tokens > 16


def test_tools_and_thinking(agent: str) -> None:
    tool = FunctionTool.from_defaults(fn=add)
    model = like(agent, "fake-model", is_function_calling_model=True)
    reply = model.chat_with_tools([tool], user_msg="Add.", allow_parallel_tool_calls=True)
    calls = model.get_tool_calls_from_response(reply)
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [("add", {"a": 1, "b": "ö"}), ("add", {"a": 2})]
    thought = [piece.additional_kwargs.get("thinking_delta") or "" for piece in model.stream_chat(HI)]
    assert "".join(thought) == "Let me see."


def test_a_forced_tool(chat: str) -> None:
    model = like(chat, is_function_calling_model=True)
    tool = FunctionTool.from_defaults(fn=add)
    calls = model.get_tool_calls_from_response(
        model.chat_with_tools([tool], user_msg="Add 1.", tool_required=True), error_on_no_tool_call=True
    )
    assert calls[0].tool_name == "add" and isinstance(calls[0].tool_kwargs["a"], int)


def test_embeddings(minilm: str) -> None:
    model = OpenAILikeEmbedding(model_name="minilm", api_base=minilm + "/v1", api_key="fake", embed_batch_size=2)
    assert [len(each) for each in model.get_text_embedding_batch(["a", "b", "c"])] == [384] * 3


def test_ollama(chat: str) -> None:
    model = Ollama(model="smollm2", base_url=chat, additional_kwargs={"num_predict": 8}, request_timeout=120)
    assert model.chat(HI).message.content
    assert "".join(piece.delta or "" for piece in model.stream_chat(HI))
