"""A chat's turn: its prompt, which tools may or must be called, and how its answer is to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from pagoda.api.answers import Answer
from pagoda.api.messages import all_kwargs, chat_prompt
from pagoda.api.protocol import ChatBody
from pagoda.api.server import Server
from pagoda.errors import BadRequest
from pagoda.text.reply import TAIL_TOKENS, ReplyReader
from pagoda.text.tools import Schemas, function_schemas

_FORCED = ("required", "any")


@dataclass(frozen=True, slots=True)
class Turn:
    """`schemas`: the functions that may be called, None if none may. `opened`: the answer begins as reasoning.

    `begun` is the beginning of a call that the prompt ends with. `shown` are special tokens to read the answer by.
    `ignored` names what the template has no place for.
    """

    prompt: list[int]
    schemas: Schemas | None
    opened: bool
    begun: str
    shown: frozenset[int]
    parallel: bool
    ignored: tuple[str, ...]


async def prepare_turn(server: Server, body: ChatBody) -> Turn:
    """Render the messages. Raises BadRequest for what the template, the model or the tools do not allow."""
    tools = [tool for tool in body.tools or [] if tool.get("type", "function") == "function"]
    schemas = function_schemas(tools)
    begun = _begun_call(server, body.tool_choice, schemas)
    changes: dict[str, Any] = {"tools": tools or None}
    if begun:  # there is no place for reasoning before a call that the prompt begins
        off = {"enable_thinking": False, "thinking": False}
        changes["tool_choice"] = "auto"
        changes["chat_template_kwargs"] = {**(body.chat_template_kwargs or {}), **off}
    body = msgspec.structs.replace(body, **changes)
    prompt = server.truncate(await chat_prompt(server, body), body.truncate_prompt_tokens)
    opened = _is_open(server, body, prompt)
    more = begun
    if opened and all_kwargs(server, body).get("enable_thinking") is False and server.format.reasoning is not None:
        more = server.format.reasoning.closing + begun
        opened = False
    if more:
        prompt = prompt + server.tokenizer.encode(more, add_special_tokens=False)
    callable_ = schemas if schemas and body.tool_choice != "none" else None
    marks = frozenset(server.format.marks(tools=callable_ is not None))
    return Turn(
        prompt,
        callable_,
        opened,
        begun,
        server.special_tokens(marks),
        body.parallel_tool_calls,
        ("tools",) if callable_ and not server.format.takes_tools else (),
    )


def _is_open(server: Server, body: ChatBody, prompt: list[int]) -> bool:
    form = server.format.reasoning
    if form is None:
        return False
    last = body.messages[-1].get("content")
    if body.continue_final_message:
        return isinstance(last, str) and form.is_open_in(last)
    return form.is_open(server.tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False))


def _begun_call(server: Server, choice: str | dict[str, Any] | None, schemas: Schemas) -> str:
    """How the answer has to begin so that it is the wanted call; "" where the model decides."""
    if choice is None or choice in ("none", "auto"):
        return ""
    name = _named(choice)
    if not schemas:
        raise BadRequest("tool_choice asks for a call, but there are no tools", param="tool_choice")
    if name is not None and name not in schemas:
        raise BadRequest(f"tool_choice names {name[:64]!r}, which is not among the tools", param="tool_choice")
    if server.format.tools is None:
        raise BadRequest(
            "tool_choice: a call can't be begun in the model's place, because its chat template does not show how it "
            "writes calls",
            remedy="Use tool_choice auto, or start the server with --tool-call-parser NAME",
            param="tool_choice",
        )
    return server.format.tools.opening(next(iter(schemas)) if name is None and len(schemas) == 1 else name)


def _named(choice: str | dict[str, Any]) -> str | None:
    """The function's name; None: any function."""
    if isinstance(choice, str):
        if choice in _FORCED:
            return None
        raise BadRequest("tool_choice must be auto, none, required or name a function", param="tool_choice")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else choice.get("name")
    if choice.get("type", "function") != "function" or not isinstance(name, str):
        raise BadRequest(
            'tool_choice must be a word or {"type": "function", "function": {"name": "..."}}', param="tool_choice"
        )
    return name


def new_answer(server: Server, turn: Turn) -> Answer:
    """A reader for one of the turn's answers."""
    form = server.format
    reader = ReplyReader(form, schemas=turn.schemas, opened=turn.opened, begun=turn.begun)
    short_ids = form.tools is not None and form.tools.short_ids
    return Answer(reader, parallel=turn.parallel, short_ids=short_ids)
