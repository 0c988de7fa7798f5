"""The calls with which clients try a server when it is entered, and what each of them needs to see in the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pagoda.deploy.connect.connect import Reply, Served, Target, Text, pick, reason
from pagoda.deploy.findings import Finding, ok, problem
from pagoda.errors import EngineError

Check = Callable[[Reply, Served], Text | None]
FIRST_TEXT_S = 10
"""RAGFlow gives up on a model whose first text takes longer."""

_JSON_BROKEN: Text = ("the answer is not what it must be: {}", "回答格式不对：{}")


@dataclass(frozen=True, slots=True)
class Call:
    """`body` is without the model, which is added. `bearer` is what the client sends where there is no key."""

    name: Text
    path: str
    check: Check
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    bearer: str = ""
    cut: bool = False


def play(call: Call, target: Target, served: Served, lang: str) -> Finding:
    """Send it as the client does; a problem says what is wrong and what to do."""
    topic = pick(call.name, lang)
    headers = dict(call.headers)
    if not target.key and call.bearer:
        headers["Authorization"] = f"Bearer {call.bearer}"
    body = None if call.body is None else {"model": served.model, **call.body}
    enough = _has_text if call.cut else lambda content: False
    try:
        reply = target.call(call.path, body, headers, enough)
    except EngineError as error:
        return problem(topic, error.message, error.remedy)
    if reply.status != 200:
        return problem(topic, f"{call.path}: {reply.status}, {reason(reply)}", pick(_cure(reply.status), lang))
    wrong = call.check(reply, served)
    if wrong is not None:
        return problem(topic, f"{call.path}: {pick(wrong, lang)}", pick(_cure(200), lang))
    return ok(topic, f"{call.path}  {(reply.first_s or reply.took_s) * 1000:.0f} ms")


def _cure(status: int) -> Text:
    if status in (401, 403):
        return ("give the server's key with --api-key", "用 --api-key 给出服务器的密钥")
    if status == 404:
        return (
            "the server does not know this path or model: is it the right --url, and the right --model?",
            "服务器没有这个路径或模型：请检查 --url 和 --model",
        )
    if status in (429, 503):
        return ("the server is busy or still loading: try again", "服务器繁忙或仍在加载：请稍后重试")
    return (
        "this client will refuse the server; look into its log, or serve the model with a newer Pagoda",
        "该客户端会拒绝这个服务器；请查看服务器日志，或改用更新的 Pagoda",
    )


def _events(reply: Reply) -> list[Any]:
    """The data of a stream's events; what is not JSON is left as text."""
    out: list[Any] = []
    for line in reply.body.decode(errors="replace").split("\n"):
        if line.startswith("data:"):
            data = line[5:].strip()
            try:
                out.append(json.loads(data))
            except ValueError:
                out.append(data)
    return out


def _has_text(body: bytes) -> bool:
    events = _events(Reply(200, {}, body[: body.rfind(b"\n") + 1], 0.0))
    return any(_delta(event).get(k) for event in events for k in ("content", "reasoning_content", "reasoning"))


def _delta(event: Any) -> dict[str, Any]:
    choices = event.get("choices") if isinstance(event, dict) else None
    delta = choices[0].get("delta") if choices else None
    return delta if isinstance(delta, dict) else {}


def _wrong(what: str) -> Text:
    return (_JSON_BROKEN[0].format(what), _JSON_BROKEN[1].format(what))


def _json_check(test: Callable[[dict[str, Any]], Any], what: str) -> Check:
    def check(reply: Reply, served: Served) -> Text | None:
        content = reply.json()
        try:
            return None if isinstance(content, dict) and test(content) else _wrong(what)
        except (KeyError, IndexError, TypeError, AttributeError):
            return _wrong(what)

    return check


def _stream(reply: Reply, served: Served) -> Text | None:
    """Framing, and what Dify, Open WebUI and the openai package need of chunks."""
    if not reply.headers.get("content-type", "").startswith("text/event-stream"):
        return _wrong("Content-Type: text/event-stream")
    if b"\r" in reply.body or b"\nevent:" in reply.body or b"\nid:" in reply.body:
        return _wrong("data: {...}\\n\\n")
    events = _events(reply)
    if not events or any(not isinstance(e, dict) or "choices" not in e for e in events[:-1]):
        return _wrong("choices")
    if reply.first_s is not None:
        return None
    if events[-1] != "[DONE]":
        return _wrong("data: [DONE]")
    ended = any(choice.get("finish_reason") for e in events[:-1] for choice in e["choices"])
    return None if ended else _wrong("finish_reason")


def _stream_with_usage(reply: Reply, served: Served) -> Text | None:
    counted = [e for e in _events(reply) if isinstance(e, dict) and e.get("usage")]
    return _stream(reply, served) or (None if len(counted) == 1 else _wrong("usage"))


def _first_text(reply: Reply, served: Served) -> Text | None:
    if reply.first_s is None:
        return _stream(reply, served) or ("the model said nothing", "模型没有输出")
    if reply.first_s > FIRST_TEXT_S:
        return (
            f"the first text took {reply.first_s:.0f} s, and the client waits {FIRST_TEXT_S} s",
            f"第一段文字用了 {reply.first_s:.0f} 秒，而客户端只等 {FIRST_TEXT_S} 秒",
        )
    return _stream(reply, served)


def _named_events(*last: str) -> Check:
    def check(reply: Reply, served: Served) -> Text | None:
        types = [e.get("type") for e in _events(reply) if isinstance(e, dict)]
        return None if types and types[-1] in last else _wrong(last[0])

    return check


def _listed(reply: Reply, served: Served) -> Text | None:
    cards = {card.get("id"): card for card in (reply.json() or {}).get("data", ())}
    if served.model not in cards:
        return _wrong("data[].id")
    return None if cards[served.model].get("max_model_len") else _wrong("max_model_len")


_chat = _json_check(
    lambda c: (
        c.get("object") in ("chat.completion", "", None) and isinstance(c["choices"][0]["message"]["content"], str)
    ),
    "object, choices[0].message.content",
)
_embedding = _json_check(
    lambda c: c["model"] and c["data"][0]["embedding"] and c["usage"]["total_tokens"] > 0,
    "model, data[].embedding, usage.total_tokens",
)
_rerank = _json_check(
    lambda c: (
        all(0 <= r["relevance_score"] <= 1 and r["index"] >= 0 for r in c["results"])
        and c["results"]
        and isinstance(c["usage"], dict)
    ),
    "results[].index, results[].relevance_score, usage",
)
_response = _json_check(lambda c: c["object"] == "response" and c["id"] and c["output"], "object, id, output")
_counted = _json_check(lambda c: c["input_tokens"] > 0, "input_tokens")

_RESPONSES: Text = ("responses", "Responses 接口")
_SAVE: Text = ("save the model", "保存模型")
_STREAM: Text = ("streamed answer", "流式回答")
_ANSWER: Text = ("whole answer", "完整回答")
_EMBED: Text = ("embedding", "向量")
_RERANK: Text = ("reranking", "重排")
_MODELS: Text = ("list of models", "模型列表")
_PING = ({"role": "user", "content": "ping"},)
_HI = ({"role": "user", "content": "Hi"},)
_FIVE = {"messages": _HI, "max_completion_tokens": 5}
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
_DOCUMENTS = {"query": "What's the weather?", "documents": ["It will rain.", "A pagoda is a tower."]}
_CHAT, _VECTORS = "/v1/chat/completions", "/v1/embeddings"
_SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
# The JDK's HTTP client offers HTTP/2 in its first request to a plain address; servers must go on in HTTP/1.1.
_UPGRADE = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAAAAMAAAAA"}
_CODEX: Mapping[str, Any] = MappingProxyType(
    {
        "instructions": "Be brief.",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "tools": [
            {"type": "function", "name": "shell", "strict": False, "parameters": _SCHEMA},
            {"type": "web_search"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "store": False,
        "stream": True,
        "include": [],
        "max_output_tokens": 16,
    }
)
_CLAUDE: Mapping[str, Any] = MappingProxyType(
    {
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "tools": [{"name": "Read", "description": "Reads a file", "input_schema": _SCHEMA}],
    }
)
_VERSION = {"anthropic-version": "2023-06-01"}


_PICTURE = (  # one pixel, as PNG
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
_LOOK = (
    {
        "role": "user",
        "content": (
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": _PICTURE, "detail": "low"}},
        ),
    },
)
_SEEN: Text = ("a picture", "图片")


def calls(client: str, served: Served) -> tuple[Call, ...]:
    """What the client sends for a model like this; empty if it has no use for it."""
    found = _CALLS[client].get(served.task, ())
    chats = served.sees and any(call.path == _CHAT for call in found)
    return (*found, Call(_SEEN, _CHAT, _chat, {"messages": _LOOK, "max_tokens": 5})) if chats else found


_OPENAI_EMBED = Call(_EMBED, _VECTORS, _embedding, {"input": ["ping"], "encoding_format": "base64"}, bearer="EMPTY")
_CALLS: Mapping[str, Mapping[str, tuple[Call, ...]]] = MappingProxyType(
    {
        "dify": {
            "generate": (
                Call(_SAVE, _CHAT, _chat, {"max_tokens": 5, "messages": _PING}),
                Call(_STREAM, _CHAT, _stream_with_usage, {"messages": _PING, "max_tokens": 5, "user": "u", **_USAGE}),
            ),
            "embed": (Call(_SAVE, _VECTORS, _embedding, {"input": ["ping"]}),),
            "score": (
                Call(_SAVE, "/v1/rerank", _rerank, {**_DOCUMENTS, "top_n": None, "return_documents": True}, {}, "None"),
            ),
        },
        "ragflow": {
            "generate": (
                Call(_MODELS, "/v1/models", _listed, bearer="x"),
                Call(_SAVE, _CHAT, _first_text, {"messages": _HI, "temperature": 0.9, "stream": True}, {}, "x", True),
            ),
            "embed": (
                Call(
                    _SAVE, _VECTORS, _embedding,
                    {"input": ["Test if the api key is available"], "encoding_format": "float", "drop_params": True},
                    {}, "x",
                ),
            ),
            # Its provider VLLM goes through a client that adds /v1 once more.
            "score": (Call(_SAVE, "/v1/v1/rerank", _rerank, {**_DOCUMENTS, "top_n": 2}, {}, "x"),),
        },
        "langchain": {
            "generate": (
                Call(_ANSWER, _CHAT, _chat, _FIVE, {}, "EMPTY"),
                Call(_STREAM, _CHAT, _stream, {**_FIVE, "stream": True}, {}, "EMPTY"),
            ),
            "embed": (_OPENAI_EMBED,),
        },
        "llamaindex": {
            "generate": (
                Call(_ANSWER, _CHAT, _chat, {"messages": _HI, "temperature": 0.1, "max_tokens": 5}, {}, "EMPTY"),
                Call(_STREAM, _CHAT, _stream, {"messages": _HI, "max_tokens": 5, "stream": True}, {}, "EMPTY"),
            ),
            "embed": (_OPENAI_EMBED,),
        },
        "openai": {
            "generate": (
                Call(_MODELS, "/v1/models", _listed, bearer="EMPTY"),
                Call(_ANSWER, _CHAT, _chat, _FIVE, {}, "EMPTY"),
                Call(_STREAM, _CHAT, _stream_with_usage, {"messages": _HI, "max_tokens": 5, **_USAGE}, {}, "EMPTY"),
                Call(_RESPONSES, "/v1/responses", _response, {"input": "Hi", "max_output_tokens": 16}),
            ),
            "embed": (Call(_MODELS, "/v1/models", _listed, bearer="EMPTY"), _OPENAI_EMBED),
        },
        "openwebui": {
            "generate": (
                Call(_MODELS, "/v1/models", _listed),
                Call(_STREAM, _CHAT, _stream, {"messages": _HI, "max_tokens": 5, "stream": True, "tools": []}),
            ),
            "embed": (Call(_EMBED, _VECTORS, _embedding, {"input": ["ping"]}),),
            "score": (Call(_RERANK, "/v1/rerank", _rerank, {**_DOCUMENTS, "top_n": 2}),),
        },
        "spring": {
            "generate": (
                Call(_ANSWER, _CHAT, _chat, {"messages": _HI, "max_tokens": 5, "stream": False}, _UPGRADE, "EMPTY"),
                Call(_STREAM, _CHAT, _stream, {"messages": _HI, "max_tokens": 5, "stream": True}, _UPGRADE, "EMPTY"),
            ),
            "embed": (Call(_EMBED, _VECTORS, _embedding, {"input": ["ping"]}, _UPGRADE, "EMPTY"),),
        },
        "claude-code": {
            "generate": (
                Call(
                    ("count tokens", "计算 token"), "/v1/messages/count_tokens?beta=true", _counted, _CLAUDE, _VERSION
                ),
                Call(
                    _STREAM, "/v1/messages?beta=true", _named_events("message_stop"),
                    {**_CLAUDE, "max_tokens": 16, "stream": True}, _VERSION, "EMPTY",
                ),
            ),
        },
        "codex": {
            "generate": (
                Call(_MODELS, "/v1/models", _listed),
                Call(_STREAM, "/v1/responses", _named_events("response.completed", "response.incomplete"), _CODEX),
            ),
        },
        "cline": {
            "generate": (Call(_STREAM, _CHAT, _stream_with_usage, {"messages": _HI, "max_tokens": 5, **_USAGE}),),
        },
        "curl": {
            "generate": (Call(_ANSWER, _CHAT, _chat, {"messages": _HI, "max_tokens": 5}),),
            "embed": (Call(_EMBED, _VECTORS, _embedding, {"input": "ping"}),),
            "score": (Call(_RERANK, "/v1/rerank", _rerank, _DOCUMENTS),),
        },
    }
)  # fmt: skip
