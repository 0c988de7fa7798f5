"""What one measurement gave: answers read from their recorded bytes, and the numbers made of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pagoda.bench.http import Exchange

METRICS = ("ttft", "tpot", "itl", "e2el")
"""Time to the first token, per token after it, between chunks, and to the end."""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Piece(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Piece | None = None
    finish_reason: str | None = None

    @property
    def is_token(self) -> bool:
        """In a chat, the chunk that opens the answer is none; a completion's chunk may hold a token without text."""
        if self.delta is not None:
            piece = self.delta
            return bool(piece.content or piece.reasoning_content or piece.reasoning or piece.tool_calls)
        return bool(self.text) or self.finish_reason is None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Answer:
    """One request: when its tokens came, and how many the server counted."""

    start_s: float
    end_s: float
    times_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    def metric(self, name: str) -> float | None:
        """Seconds, or None where there is nothing to measure."""
        first = self.times_s[0]
        if name == "ttft":
            return first - self.start_s
        if name == "e2el":
            return self.times_s[-1] - self.start_s
        return (self.times_s[-1] - first) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def gaps_s(self) -> Iterator[float]:
        return (b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False))


def read(exchange: Exchange) -> Answer:
    """Read a recorded stream: an event has the time at which its last byte came."""
    answer = Answer(exchange.start_s, exchange.end_s, error=exchange.error)
    if not answer.error and exchange.status != 200:
        answer.error = f"HTTP {exchange.status}: {reason(exchange.body)}"
    if answer.error:
        return answer
    ended, counted = False, False
    for at_s, line in _lines(exchange.arrived):
        data = line.removeprefix(b"data:").strip()
        if len(data) == len(line) or data == b"[DONE]":
            continue
        try:
            event = _decode(data)
        except msgspec.DecodeError as error:
            answer.error = f"an event cannot be read: {error}"
            return answer
        if event.error:
            answer.error = reason(data)
        if event.usage is not None:
            counted = True
            answer.prompt_tokens, answer.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            answer.cached_tokens = (details.cached_tokens or 0) if details else 0
        for choice in event.choices[:1]:
            ended = ended or choice.finish_reason is not None
            # The end of an answer that never had text is the first that can be seen of it.
            if choice.is_token or (choice.finish_reason and not answer.times_s):
                answer.times_s.append(at_s)
    if not counted:
        answer.output_tokens = len(answer.times_s)
    if not answer.error and not (ended and answer.times_s):
        answer.error = "the stream broke off before its end"
    return answer


def _lines(arrived: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    rest = b""
    for at_s, piece in arrived:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield at_s, line
    if arrived:
        yield arrived[-1][0], rest


def reason(body: bytes) -> str:
    """What an error's body says."""
    try:
        error = msgspec.json.decode(body)
        error = error.get("error", error) if isinstance(error, dict) else error
        error = error.get("message", error) if isinstance(error, dict) else error
        return str(error)[:300]
    except msgspec.DecodeError:
        return body[:300].decode(errors="replace")


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values, between two neighbours in proportion."""
    place = (len(values) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def summary(
    answers: Sequence[Answer], wall_s: float, percentiles: Sequence[float], goals_ms: Mapping[str, float]
) -> dict[str, Any]:
    """The numbers of one measurement, under the names that vLLM's benchmark gives them."""
    good = [a for a in answers if not a.error]
    tokens_in, tokens_out = sum(a.prompt_tokens for a in good), sum(a.output_tokens for a in good)
    out: dict[str, Any] = {
        "duration": round(wall_s, 3),
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "cached_tokens": sum(a.cached_tokens for a in good),
        "request_throughput": round(len(good) / wall_s, 3),
        "output_throughput": round(tokens_out / wall_s, 2),
        "total_token_throughput": round((tokens_in + tokens_out) / wall_s, 2),
    }
    if goals_ms:
        out["request_goodput"] = round(sum(_meets(a, goals_ms) for a in good) / wall_s, 3)
    for name in METRICS:
        values = [g for a in good for g in a.gaps_s()] if name == "itl" else [a.metric(name) for a in good]
        out |= _spread(name, sorted(v * 1000 for v in values if v is not None), percentiles)
    if len(good) < len(answers):
        out["errors"] = sorted({a.error for a in answers if a.error})[:5]
    return out


def _meets(answer: Answer, goals_ms: Mapping[str, float]) -> bool:
    seen = {name: answer.metric(name) for name in goals_ms}
    return all((seen[name] or 0.0) * 1000 <= limit for name, limit in goals_ms.items())


def _spread(name: str, values_ms: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    if not values_ms:
        return {}
    out = {
        f"mean_{name}_ms": statistics.fmean(values_ms),
        f"median_{name}_ms": statistics.median(values_ms),
        f"std_{name}_ms": statistics.pstdev(values_ms),
        **{f"p{share:g}_{name}_ms": percentile(values_ms, share) for share in percentiles},
    }
    return {key: round(value, 3) for key, value in out.items()}
