"""`pagoda chat`: talk to a model in the terminal, over a server or with an engine of its own."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from pagoda.cli.inputs import load, split
from pagoda.cli.model import local_model
from pagoda.cli.talk import Local, Message, Partner, Remote
from pagoda.errors import ConfigError, PagodaError
from pagoda.options.check import check

HELP = """\
Usage: pagoda chat [MODEL] [options]

Without MODEL: talks to the server that runs at --url. With MODEL: loads it into this process, no server needed.

Examples:
  pagoda chat
  pagoda chat -q "What is photosynthesis? One sentence."
  pagoda chat ./model.gguf --system-prompt "Answer in one sentence."

Options:
  --url URL               the server (default http://localhost:8000/v1)
  --model-name NAME       the model's name at that server (default: the first it lists)
  --api-key KEY           the server's key (or in PAGODA_API_KEY, VLLM_API_KEY, OPENAI_API_KEY)
  --system-prompt TEXT    what the model is told before the chat
  -q, --quick TEXT        ask one question, print the answer, end
  --stats                 print the time to the first token and tokens per second after each answer
  --temperature X, --max-tokens N
With MODEL, the model and machine options of pagoda serve work too: --max-model-len, --threads, ...

In the chat: /new forgets what was said, /exit ends (so does Ctrl-D); Ctrl-C stops an answer.
"""

TEXT_OPTIONS = ("url", "model_name", "api_key", "system_prompt", "quick", "temperature", "max_tokens")


@dataclass
class Wishes:
    """What the command line asked of the chat itself; `rest` belongs to the engine."""

    values: dict[str, str] = field(default_factory=dict)
    stats: bool = False
    rest: list[str] = field(default_factory=list)

    def count(self) -> dict[str, Any]:
        """Fields that make a server tell how many tokens an answer had, where that is wanted."""
        return {"stream_options": {"include_usage": True}} if self.stats else {}

    def number(self, name: str, kind: type[int] | type[float]) -> dict[str, Any]:
        if name not in self.values:
            return {}
        try:
            return {name: kind(self.values[name])}
        except ValueError:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: {self.values[name]} is not a number") from None


def run(argv: list[str]) -> int:
    """The command: one question with -q, else a chat until /exit."""
    wishes = read_wishes("chat", argv)
    if split(wishes.rest).help is not None:
        print(HELP, end="")
        return 0
    partner = _partner(wishes)
    messages: list[Message] = []
    if system := wishes.values.get("system_prompt"):
        messages.append({"role": "system", "content": system})
    return converse(partner, wishes, messages)


def converse(partner: Partner, wishes: Wishes, messages: list[Message]) -> int:
    """Ask what -q says, or what is typed."""
    try:
        if "quick" in wishes.values:
            _ask(partner, messages, wishes.values["quick"], wishes.stats)
            return 0
        return _talk(partner, messages, wishes.stats)
    finally:
        partner.close()


def read_wishes(command: str, argv: list[str]) -> Wishes:
    wishes = Wishes()
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = "quick" if flag == "-q" else flag.removeprefix("--").replace("-", "_")
        if word == "--stats":
            wishes.stats = True
        elif not flag.startswith("-") or name not in TEXT_OPTIONS:
            wishes.rest.append(word)
        elif equals:
            wishes.values[name] = value
        elif words:
            wishes.values[name] = words.pop(0)
        else:
            raise ConfigError(f"{flag} needs a value", remedy=f"See: pagoda {command} --help")
    return wishes


def _partner(wishes: Wishes) -> Partner:
    sampling = wishes.number("temperature", float) | wishes.number("max_tokens", int)
    if wishes.rest:
        settings = load(split(wishes.rest), os.environ)
        check(settings)
        options = settings.options
        if options.model is None and not options.models:
            raise ConfigError(f"{wishes.rest[0]} needs a model", remedy="Name one: pagoda chat ./model.gguf")
        return Local(options, local_model(options), sampling)
    return Remote(*server_of(wishes), sampling | wishes.count())


def server_of(wishes: Wishes) -> tuple[str, str | None, str | None]:
    """Address, model and key of the server that is meant."""
    values, environ = wishes.values, os.environ
    keys = (values.get("api_key"), *(environ.get(f"{owner}_API_KEY") for owner in ("PAGODA", "VLLM", "OPENAI")))
    key = next((key for key in keys if key), None)
    return values.get("url", "http://localhost:8000/v1"), values.get("model_name"), key


def _talk(partner: Partner, messages: list[Message], stats: bool) -> int:
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
        print(f"{partner.name}: /new forgets what was said, /exit ends")
    begin = list(messages)
    while True:
        try:
            text = input("> " if at_terminal else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            return 130
        if text in ("/exit", "/quit", "/bye"):
            return 0
        if text == "/new":
            messages[:] = begin
        elif text.startswith("/") and " " not in text:
            print("Commands: /new, /exit")
        elif text:
            try:
                _ask(partner, messages, text, stats)
            except PagodaError as error:
                if not at_terminal:
                    raise
                print(f"pagoda: {error}", file=sys.stderr)


def _ask(partner: Partner, messages: list[Message], text: str, stats: bool) -> None:
    """Print the answer as it comes; keep both in the history. A question that failed is forgotten."""
    began, first_s = time.monotonic(), 0.0
    question: Message = {"role": "user", "content": text}
    parts: list[str] = []
    answer = partner.answer([*messages, question])
    try:
        for part in answer:
            print(part, end="", flush=True)
            first_s = first_s or time.monotonic() - began
            parts.append(part)
    except KeyboardInterrupt:
        print(" ...", end="")
    finally:
        answer.close()
        if parts:
            print()
    if stats:
        total_s = time.monotonic() - began
        tokens = partner.tokens or len(parts)
        print(
            f"TTFT: {first_s * 1000:.0f} ms\nTPS:  {tokens / total_s:.2f} tokens/s ({tokens} tokens in {total_s:.2f} s)"
        )
    messages += [question, {"role": "assistant", "content": "".join(parts)}]
