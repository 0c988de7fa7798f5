"""POST /v1/chat/completions/batch: several conversations in one request, a choice for each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.stream import Outlet, Reply, answer
from pagoda.api.openai.chat import ChatCall, start_chat
from pagoda.api.openai.replies import ChatReply
from pagoda.api.serving.server import Server
from pagoda.api.serving.usage import CompletionTokensDetails, PromptTokensDetails, Usage
from pagoda.api.turn.bodies import ChatBody
from pagoda.errors import BadRequest, PagodaError


class ChatBatchBody(msgspec.Struct, kw_only=True):
    """All other fields are those of /v1/chat/completions, and hold for each conversation."""

    messages: list[list[dict[str, Any]]]


async def chat_batch(server: Server, request: Request) -> Reply:
    raw = await read_body(request)
    conversations = parse(raw, ChatBatchBody)[0].messages
    if not conversations or not all(conversations):
        raise BadRequest("messages must be a list of conversations, none of them empty", param="messages")
    server.check_count(len(conversations))
    shared = msgspec.json.decode(raw)
    chats: list[ChatCall] = []
    ignored: list[str] = []
    try:
        for messages in conversations:
            body, unknown = parse(msgspec.json.encode({**shared, "messages": messages}), ChatBody)
            _check(body)
            chats.append(await start_chat(server, request, body))
            ignored += [*unknown, *chats[-1].ignored]
    except BaseException as error:
        for chat in chats:
            chat.generation.close(error.status if isinstance(error, PagodaError) else 500)
        raise
    call = _Batch(chats)
    reply = await answer(call, call.whole(), request.receive, server.aborted)
    server.dress(reply, list(dict.fromkeys(ignored)), chats[0].generation)
    return reply


def _check(body: ChatBody) -> None:
    """Refuse what one choice for each conversation cannot hold."""
    for name, given in (
        ("stream", body.stream),
        ("tools", body.tools),
        ("n", (body.n or 1) != 1),
        ("use_beam_search", body.use_beam_search),
    ):
        if given:
            raise BadRequest(
                f"{name}: conversations in a batch are answered whole, once and without tools",
                remedy="Send such ones to /v1/chat/completions",
                param=name,
            )


class _Batch:
    """All calls of one request, which end together."""

    outlet: Outlet | None = None

    def __init__(self, chats: Sequence[ChatCall]) -> None:
        self._chats = chats
        first = chats[0].generation
        self.id = first.id
        self.deadline_s = first.deadline_s

    @property
    def time_left_s(self) -> float | None:
        return self._chats[0].generation.time_left_s

    async def whole(self) -> ChatReply:
        tasks = [asyncio.ensure_future(chat.whole()) for chat in self._chats]
        try:
            replies = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        for index, each in enumerate(replies):
            each.choices[0].index = index
        first = replies[0]
        first.choices = [each.choices[0] for each in replies]
        first.usage = _sum([each.usage for each in replies])
        return first

    def close(self, status: int) -> None:
        for chat in self._chats:
            chat.generation.close(status)


def _sum(parts: Sequence[Usage]) -> Usage:
    prompt, completion = (sum(getattr(each, f"{kind}_tokens") for each in parts) for kind in ("prompt", "completion"))
    cached = sum(each.prompt_tokens_details.cached_tokens for each in parts)
    reasoning = sum(each.completion_tokens_details.reasoning_tokens for each in parts)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning),
    )
