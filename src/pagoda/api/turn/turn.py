"""A chat's turn: its prompt, which tools may or must be called, and how its answer is to be read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from pagoda.api.serving.generation import Generation, ThinkingLimit
from pagoda.api.serving.server import Server
from pagoda.api.turn.answers import Answer
from pagoda.api.turn.bodies import ChatBody
from pagoda.api.turn.prompt import all_kwargs, chat_prompt, thinking_budget
from pagoda.api.turn.sampling import beam_search
from pagoda.api.turn.structured import answer_part, checked
from pagoda.api.turn.tools import allowed, forced, read_tools
from pagoda.errors import BadRequest
from pagoda.text.reply import TAIL_TOKENS, ReplyFormat, ReplyReader
from pagoda.text.reply_grammar import forced_calls, reply_grammar, wanted_calls
from pagoda.text.tools import PLAIN_FORMAT, Schemas, function_schemas
from pagoda.types import Image, SamplingParams


@dataclass(frozen=True, slots=True)
class Turn:
    """`schemas`: the functions that may be called, None if none may. `opened`: the answer begins as reasoning.

    `custom`: those of them that stand for custom tools. `form` is how the answer is written, `grammar` what it must
    match. `shown` are special tokens to read it by. `ignored` names what has no effect here. `thinking` is the limit
    for its reasoning, if there is one.
    """

    prompt: list[int]
    images: list[Image]
    schemas: Schemas | None
    custom: frozenset[str]
    form: ReplyFormat
    opened: bool
    shown: frozenset[int]
    parallel: bool
    grammar: str
    ignored: tuple[str, ...]
    thinking: ThinkingLimit | None

    def limit(self, params: SamplingParams) -> SamplingParams:
        """The parameters with what the answer must match."""
        return msgspec.structs.replace(params, grammar=self.grammar) if self.grammar else params


async def prepare_turn(server: Server, body: ChatBody) -> Turn:
    """Render the messages. Raises BadRequest for what the template, the model or the tools do not allow."""
    read = read_tools(body.tools or ())
    tools, choice = allowed(read.functions, body.tool_choice)
    schemas = function_schemas(tools)
    wanted = forced(choice, schemas)
    changes: dict[str, Any] = {"tools": tools or None, "tool_choice": choice}
    if wanted is not None:  # templates know the words only
        changes["tool_choice"] = "auto"
    body = msgspec.structs.replace(body, **changes)
    whole = await chat_prompt(server, body)
    prompt = server.truncate(whole.ids, body.truncate_prompt_tokens, body.truncation_side)
    if whole.images and len(prompt) < len(whole.ids):
        raise BadRequest("truncate_prompt_tokens: a prompt with pictures is not cut", param="truncate_prompt_tokens")
    opened = _is_open(server, body, prompt)
    silent = all_kwargs(server, body).get("enable_thinking") is False
    if opened and silent and server.format.reasoning is not None:
        prompt = prompt + server.tokenizer.encode(server.format.reasoning.closing, add_special_tokens=False)
        opened = False
    callable_ = schemas if schemas and body.tool_choice != "none" else None
    form = server.format
    if wanted is not None and form.tools is None:
        form = replace(form, tools=PLAIN_FORMAT)
    marks = frozenset(form.marks(tools=callable_ is not None))
    thinks = not silent and not body.continue_final_message
    return Turn(
        prompt,
        whole.images,
        callable_,
        read.custom,
        form,
        opened,
        server.special_tokens(marks),
        body.parallel_tool_calls,
        await _grammar(server, body, form, wanted, callable_, opened=opened, thinks=thinks),
        (*read.ignored, *(["tools"] if callable_ and not server.format.takes_tools else [])),
        _thinking_limit(server, body, opened),
    )


def _thinking_limit(server: Server, body: ChatBody, opened: bool) -> ThinkingLimit | None:
    """None where nobody set one, or the model does not think."""
    tokens, form = thinking_budget(body), server.format.reasoning
    if not tokens or form is None:
        return None
    closing = server.tokenizer.encode(form.closing, add_special_tokens=False)
    return ThinkingLimit(tokens, form, closing, opened)


async def _grammar(
    server: Server,
    body: ChatBody,
    form: ReplyFormat,
    wanted: Schemas | None,
    callable_: Schemas | None,
    *,
    opened: bool,
    thinks: bool,
) -> str:
    """What the answer must match: calls, where they are wanted or strict, or what the content must be, or both."""
    found = answer_part(body, server.tokenizer)
    calls: list[str] = []
    free = False
    field = "tools" if found is None else found[0]
    if form.tools is not None and callable_ is not None:
        parallel = body.parallel_tool_calls
        free = wanted is None and found is None and not form.is_harmony and _any_strict(body)
        if wanted is not None:
            several = parallel and wanted is callable_
            calls = forced_calls(form.tools, wanted, server.tokenizer, parallel=several)
            found = None
        elif free:
            calls = wanted_calls(form.tools, callable_, server.tokenizer, parallel=parallel)
        elif found is not None:
            calls = forced_calls(form.tools, callable_, server.tokenizer, parallel=parallel)
    if not calls and found is None:
        return ""
    answer = None if found is None else found[1]
    text = reply_grammar(form, server.tokenizer, answer=answer, calls=calls, free=free, opened=opened, thinks=thinks)
    return await checked(server, field, text)


def _any_strict(body: ChatBody) -> bool:
    functions = [tool.get("function") for tool in body.tools or []]
    return any(isinstance(each, dict) and each.get("strict") is True for each in functions)


def _is_open(server: Server, body: ChatBody, prompt: list[int]) -> bool:
    form = server.format.reasoning
    if form is None:
        return False
    last = body.messages[-1].get("content")
    if body.continue_final_message:
        return isinstance(last, str) and form.is_open_in(last)
    return form.is_open(server.tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False))


def start_turn(
    server: Server, kind: str, turn: Turn, params: SamplingParams, body: ChatBody, *, model: str
) -> Generation:
    """Admit the call of one turn. Whoever calls this must close the Generation."""
    params = turn.limit(params)
    return server.start(
        kind,
        [turn.prompt],
        params,
        images=[turn.images],
        model=model,
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
        shown=turn.shown,
        deadline_s=body.deadline_s,
        thinking=turn.thinking,
        client_id=body.request_id,
        beams=beam_search(body, params),
    )


def new_answer(server: Server, turn: Turn, *, silent: bool = False) -> Answer:
    """A reader for one of the turn's answers, which tells nothing of its reasoning if it is `silent`."""
    reader = ReplyReader(turn.form, schemas=turn.schemas, opened=turn.opened)
    short_ids = turn.form.tools is not None and turn.form.tools.short_ids
    return Answer(reader, parallel=turn.parallel, short_ids=short_ids, silent=silent, custom=turn.custom)
