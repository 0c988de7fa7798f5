"""What is asked in a measurement: made-up prompts of a wanted length, with shared beginnings, or those of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from pagoda.errors import ConfigError

# Common words are one token each in the usual vocabularies; what the server counts corrects the rest.
_WORDS = tuple(
    """time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home water
room mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city community name president team minute idea kid
body information back parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force education foot boy age policy music market sense nation
plan college interest death course someone experience behind reach local six large million second street paper
space ground form support event official matter center couple site project base hit star table need court oil
situation cost industry figure road land simply field step effort model price report season west board voice rate
unit rule view window door chair river stone light green black white small great young long little old high low
early late hard easy open close strong weak full empty clear dark warm cold fast slow rich poor deep wide near far
""".split()
)
MAX_WORDS = 4_000_000

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one request asks: a text, or messages; and how many tokens it may give."""

    text: str
    output_tokens: int
    messages: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens of made-up prompts. `spread` 0.2 means 20 % more or less; each of `prefixes` is shared."""

    input_tokens: int = 128
    output_tokens: int = 128
    spread: float = 0.0
    prefix_tokens: int = 0
    prefixes: int = 1


@dataclass(frozen=True, slots=True)
class Scale:
    """How a server counts: `base` tokens around a prompt (its chat template), and tokens per word."""

    base: float = 0.0
    per_word: float = 1.0

    def words(self, tokens: int, *, whole: bool = True) -> int:
        count = (tokens - (self.base if whole else 0)) / self.per_word
        return min(MAX_WORDS, max(1, round(count)))


def scale_of(words: tuple[int, int], tokens: tuple[int, int]) -> Scale:
    """What two prompts of known size tell."""
    per_word = (tokens[1] - tokens[0]) / (words[1] - words[0])
    return Scale(tokens[0] - per_word * words[0], per_word) if per_word > 0.1 else Scale()


def text_of(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=words))


def made_up(shape: Shape, scale: Scale, rng: random.Random) -> Iterator[Prompt]:
    """Prompts without end. They differ from the first word on, so that no cache knows them, but for the prefixes."""
    heads = [text_of(rng, scale.words(shape.prefix_tokens, whole=False)) + " " for _ in range(shape.prefixes)]
    if not shape.prefix_tokens:
        heads = [""]
    for head in cycle(heads):
        words = scale.words(about(shape.input_tokens, shape.spread, rng))
        yield Prompt(head + text_of(rng, words), about(shape.output_tokens, shape.spread, rng))


def about(tokens: int, spread: float, rng: random.Random) -> int:
    return max(1, rng.randint(round(tokens * (1 - spread)), round(tokens * (1 + spread)))) if spread else tokens


def from_file(path: str, output_tokens: int) -> list[Prompt]:
    """Prompts of a file: JSON lines with `prompt` or `messages`, ShareGPT's JSON, or plain text, one a line."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", remedy="Give a text file with --dataset-path") from None
    try:
        prompts = [p for p in (_prompt(row, output_tokens) for row in _rows(path, text)) if p is not None]
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", remedy='Write one {"prompt": "..."} a line') from None
    if not prompts:
        raise ConfigError(f"{path} holds no prompts", remedy='Write one {"prompt": "..."} a line')
    return prompts


def _rows(path: str, text: str) -> list[Any]:
    if path.endswith(".json"):
        rows = json.loads(text)
        return rows if isinstance(rows, list) else [rows]
    lines = [line for line in text.splitlines() if line.strip()]
    return [json.loads(line) for line in lines] if path.endswith(".jsonl") else lines


def _prompt(row: Any, output_tokens: int) -> Prompt | None:
    if isinstance(row, str):
        return Prompt(row, output_tokens)
    if not isinstance(row, dict):
        return None
    count = row.get("output_tokens")
    tokens = count if isinstance(count, int) and count > 0 else output_tokens
    if isinstance(messages := row.get("messages"), list) and messages:
        return Prompt("\n".join(str(m.get("content")) for m in messages if isinstance(m, dict)), tokens, (*messages,))
    turns = row.get("conversations")
    said = turns[0].get("value") if isinstance(turns, list) and turns and isinstance(turns[0], dict) else None
    text = row.get("prompt", said)
    return Prompt(text, tokens) if isinstance(text, str) and text else None


def take(prompts: Iterator[P], count: int) -> list[P]:
    return list(islice(prompts, count))
