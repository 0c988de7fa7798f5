"""Two partners to chat with: a server over HTTP, and an engine inside this process. Both stream their answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import signal
from collections.abc import Generator, Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

from pagoda.cli.model import sampling_defaults
from pagoda.cli.screen import ProgressLine
from pagoda.errors import ConfigError, ContextLengthExceeded, EngineError, ModelError
from pagoda.options.config import Options

Message = dict[str, Any]
CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 3600


class Partner(Protocol):
    """Who answers. Closing the iterator stops the answer. `tokens` are those of the last answer, 0 if not known."""

    name: str
    tokens: int

    def answer(self, messages: list[Message]) -> Generator[str]: ...

    def close(self) -> None: ...


class Remote:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, model: str | None, api_key: str | None, sampling: dict[str, Any]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url} is not an address", remedy="Write it as http://localhost:8000/v1")
        self._parts, self._url, self._sampling = parts, url, sampling
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.tokens = 0
        self.name = model or self._first_model()

    def _first_model(self) -> str:
        models = json.loads(self._send("GET", "/models").read()).get("data") or []
        if not models:
            raise EngineError(f"The server at {self._url} lists no model", remedy="Name one with --model-name")
        return str(models[0]["id"])

    def _send(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
            connection.sock.settimeout(ANSWER_TIMEOUT_S)
            content = None if body is None else json.dumps(body)
            connection.request(method, self._parts.path.rstrip("/") + path, content, self._headers)
            response = connection.getresponse()
        except OSError as error:
            connection.close()
            raise EngineError(
                f"There is no server at {self._url}: {error.strerror or error}",
                remedy="Start one with: pagoda serve  or name a model: pagoda chat ./model.gguf",
            ) from None
        if response.status != 200:
            raise EngineError(f"The server answered {response.status}: {_reason(response.read())}")
        return response

    def answer(self, messages: list[Message]) -> Generator[str]:
        return self._stream("/chat/completions", {"messages": messages})

    def _stream(self, path: str, asked: dict[str, Any]) -> Generator[str]:
        self.tokens = 0
        response = self._send("POST", path, {"model": self.name, **asked, "stream": True, **self._sampling})
        try:
            for line in response:
                data = line.strip().removeprefix(b"data: ")
                if data == line.strip() or data == b"[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise EngineError(f"The server stopped: {_reason(data)}")
                self.tokens = (event.get("usage") or {}).get("completion_tokens") or self.tokens
                for choice in event.get("choices") or ():
                    if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
                        yield text
        finally:
            response.close()

    def close(self) -> None:
        return None


class Continuer(Remote):
    """The same server, which goes on with the last text, and knows of no other."""

    def answer(self, messages: list[Message]) -> Generator[str]:
        return self._stream("/completions", {"prompt": messages[-1]["content"]})


def _reason(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C only fills the list: an exception in the middle of a step would leave the engine half-way."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


class Local:
    """An engine of its own in this process."""

    def __init__(self, options: Options, path: str, sampling: dict[str, Any]) -> None:
        from pagoda.arch.dummy import open_model
        from pagoda.engine.core import EngineCore
        from pagoda.text.chat import load_chat_template
        from pagoda.text.generation import load_generation_defaults
        from pagoda.text.tokenizer import load_tokenizer

        source = open_model(path, options.load_format)
        metadata = source.metadata
        self._tokenizer = load_tokenizer(path, metadata, bytes_else=options.load_format == "dummy")
        template = load_chat_template(path, metadata, options.chat_template)
        if template is None:
            raise ModelError("This model has no chat template", remedy="Give one with --chat-template FILE")
        self._template, self._template_kwargs = template, dict(options.default_chat_template_kwargs)
        defaults = load_generation_defaults(path, metadata)
        source.close()
        self._eos = defaults.eos_token_ids
        self._sampling = {**sampling_defaults(options, defaults.params), **sampling}
        progress = ProgressLine()
        self._core = EngineCore(options.engine_config(path), progress)
        progress.clear()
        self.tokens = 0
        self.name = options.model or path

    def answer(self, messages: list[Message]) -> Generator[str]:
        from pagoda.text.output import TextOutput
        from pagoda.types import Request, SamplingParams

        prompt = self._template.encode(self._tokenizer, messages, template_kwargs=self._template_kwargs)
        room = self._core.info.max_model_len - len(prompt)
        if room < 1:
            raise ContextLengthExceeded(
                "This chat is longer than the model's context", remedy="Type /new to begin again"
            )
        wanted = {"seed": secrets.randbits(63), **self._sampling}
        wanted["max_tokens"] = min(room, int(wanted.get("max_tokens") or room))
        params = SamplingParams(**wanted)
        params.check(self._tokenizer.vocab_size)
        request = Request(
            request_id=secrets.token_hex(8), prompt_token_ids=prompt, params=params, eos_token_ids=self._eos
        )
        output, self.tokens = TextOutput(self._tokenizer, request), 0
        self._core.add(request)
        with _deferred_interrupt() as interrupted:
            try:
                while not output.finished and self._core.has_work and not interrupted:
                    for delta in self._core.step():
                        if delta.error:
                            raise EngineError(delta.error)
                        self.tokens += len(delta.token_ids)
                        if text := output.feed(delta).text:
                            yield text
            finally:
                self._core.cancel(request.request_id)
                while self._core.has_work:
                    self._core.step()
        if interrupted:
            raise KeyboardInterrupt

    def close(self) -> None:
        self._core.close()
