"""For tests of the API: a byte tokenizer, an engine that answers by rule, a client in memory, a server on a port."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import httpx
import msgspec

from pagoda.api.app import create_app
from pagoda.api.http.listen import bind_socket
from pagoda.api.run import run_server
from pagoda.api.serving.server import Server
from pagoda.engine.messages import EngineStats, ModelInfo
from pagoda.errors import BadRequest
from pagoda.sched.stats import SchedulerStats
from pagoda.types import Delta, Request, TokenLogprob

EOS = 257
IM_START = 258
VOCAB = 260
SPECIAL = {256: b"<s>", EOS: b"</s>", IM_START: b"<|im_start|>", 259: b"<|im_end|>"}
TEXT = "Hello, wörld! 🙂 This is what the fake model says."


def without_nulls(table: dict[str, Any]) -> dict[str, Any]:
    """What a message says; the fields that are always there may be null."""
    return {name: value for name, value in table.items() if value is not None}


class ByteTokenizer:
    """One token per byte, and four special ones."""

    vocab_size = VOCAB
    bos_token_id = 256
    eos_token_ids = (EOS,)
    special_ids = frozenset(SPECIAL)
    special_pattern = re.compile("|".join(re.escape(text.decode()) for text in SPECIAL.values()))
    strip_first = False

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        shown = [i for i in ids if not (skip_special_tokens and i in SPECIAL)]
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return SPECIAL.get(token_id) or bytes([token_id])

    def token_piece(self, token_id: int) -> str:
        return f"<{token_id}>"

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")


class PlainTemplate:
    """`role: content` lines and an opening of the answer; keeps what it was given. `source` is only looked at."""

    def __init__(self, source: str = "{{ messages }}", opening: str = "") -> None:
        self.source = self.all_source = source
        self.opening = opening
        self.seen: list[dict[str, Any]] = []

    def encode(
        self,
        tokenizer: ByteTokenizer,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        self.seen.append({"messages": messages, "tools": tools, "kwargs": template_kwargs})
        if not messages:
            raise BadRequest("messages must not be empty", param="messages")
        text = "".join(f"{message['role']}: {message.get('content')}\n" for message in messages)
        if continue_final_message:
            text = text[:-1]
        return [IM_START, *text.encode(), *((b"assistant: " + self.opening.encode()) if add_generation_prompt else b"")]


def model_info(**changes: Any) -> ModelInfo:
    info = ModelInfo(
        model="/models/fake",
        architecture="fake",
        vocab_size=VOCAB,
        max_model_len=512,
        model_max_len=512,
        num_blocks=100,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        weight_bytes=1,
        kv_bytes=1,
        activation_bytes=1,
        device="fake",
        weight_types="F32",
        eos_token_ids=(EOS,),
        load_s=0.1,
    )
    return msgspec.structs.replace(info, **changes)


class FakeEngine:
    """Answers every request with `text`, a token per delta; the first delta tells of 4 cached tokens."""

    def __init__(self, text: str = TEXT, *, delay_s: float = 0.0, fail_after: int | None = None, **info: Any) -> None:
        self.info = model_info(**info)
        self.ready = True
        self.responsive = True
        self.pid: int | None = os.getpid()
        self.restarts = 3
        self.on_dead: Callable[[str], None] | None = None
        self.tokens = [*text.encode(), EOS]
        self.delay_s = delay_s
        self.fail_after = fail_after
        self.failure = "the model ran out of luck"
        self.requests: list[Request] = []
        self.live = 0
        self.cancelled = 0
        self.started = self.stopped = False

    @property
    def engines(self) -> tuple[FakeEngine, ...]:
        return (self,)

    @property
    def stats(self) -> EngineStats:
        scheduler = SchedulerStats(
            running=self.live,
            waiting=0,
            blocks_used=25,
            blocks_total=100,
            prefix_queries_tokens=10,
            prefix_hits_tokens=4,
            preemptions=0,
            prompt_tokens=100,
            generation_tokens=50,
        )
        return EngineStats(scheduler=scheduler, steps=7, last_step_s=0.01)

    async def start(self, on_progress: object = None) -> None:
        self.started = True

    async def stop(self) -> None:
        self.stopped = True

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.live += 1
        whole = False
        try:
            known = len(request.output_token_ids)
            for count, token in enumerate(self.tokens[known:], known):
                await asyncio.sleep(self.delay_s)
                if count == self.fail_after:
                    yield Delta(request_id=request.request_id, finish_reason="error", error=self.failure)
                    whole = True
                    return
                delta = self._delta(request, count, token)
                whole = delta.finish_reason is not None
                yield delta
                if whole:
                    return
        finally:
            self.live -= 1
            self.cancelled += not whole

    def _delta(self, request: Request, count: int, token: int) -> Delta:
        params = request.params
        assert params.max_tokens is not None
        delta = Delta(request_id=request.request_id, token_ids=[token], cached_tokens=4 if count == 0 else 0)
        if params.logprob_token_ids:
            delta.logprobs = [TokenLogprob(token, -0.5, [(each, -each / 100) for each in params.logprob_token_ids])]
        elif params.logprobs is not None:
            delta.logprobs = [scored(token, params.logprobs)]
        if params.prompt_logprobs is not None and count == 0:
            ids = request.prompt_token_ids
            delta.prompt_logprobs = [None, *(scored(i, params.prompt_logprobs) for i in ids[1:])]
        if token in request.eos_token_ids and not params.ignore_eos:
            delta.finish_reason = "stop"
        elif token in params.stop_token_ids:
            delta.finish_reason, delta.stop_reason = "stop", token
        elif count + 1 >= min(params.max_tokens, len(self.tokens)):
            delta.finish_reason = "length"
        return delta


def scored(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, [((token + i) % 128 if i else token, -0.5 - i) for i in range(top)])


def make_server(engine: FakeEngine | None = None, **changes: Any) -> Server:
    values: dict[str, Any] = {
        "engine": engine or FakeEngine(),
        "tokenizer": ByteTokenizer(),
        "names": ("fake-model",),
        "root": "/models/fake",
        "chat_template": PlainTemplate(),
        "version": "1.2.3",
    }
    return Server(**{**values, **changes})


class Client:
    """Calls the application in memory; one event loop for all calls."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._runner = asyncio.Runner()
        transport = httpx.ASGITransport(app=create_app(server), raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://localhost:8000")

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()

    def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self._runner.run(self._http.request(method, path, **more))

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.call("GET", path, **more)

    def post(self, path: str, body: dict[str, Any] | bytes, **more: Any) -> httpx.Response:
        if isinstance(body, bytes):
            return self.call("POST", path, content=body, **more)
        return self.call("POST", path, json=body, **more)

    def chat(self, content: str = "Hi", **more: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **more})

    def complete(self, prompt: Any = "Hi", **more: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **more})


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, checked for framing; `[DONE]` stays a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "\r" not in response.text
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    out: list[Any] = []
    for block in blocks:
        assert block.startswith("data: ") and "\n" not in block
        data = block.removeprefix("data: ")
        out.append(data if data == "[DONE]" else json.loads(data))
    return out


@contextmanager
def on_port(server: Server, engine: FakeEngine) -> Iterator[str]:
    """The server under uvicorn on a free port of this machine; gives its base URL."""
    listener = bind_socket("127.0.0.1", 0)
    ready = threading.Event()
    loop: list[asyncio.AbstractEventLoop] = []

    def note_ready() -> None:
        loop.append(asyncio.get_running_loop())
        ready.set()

    thread = threading.Thread(target=lambda: run_server(server, engine, listener, drain_s=2, on_ready=note_ready))
    port = listener.getsockname()[1]
    thread.start()
    assert ready.wait(60)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        assert engine.on_dead is not None
        loop[0].call_soon_threadsafe(engine.on_dead, "the test is over")
        thread.join(30)
        assert not thread.is_alive()
