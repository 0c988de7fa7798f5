"""Reads the few options of a small command: names with values, switches, and plain words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pagoda.errors import ConfigError

N = TypeVar("N", int, float)

_MANY = ("include", "exclude", "goodput")
"""Options that take all words up to the next option, as in `hf download --include A B C`."""


@dataclass
class Words:
    """What the user wrote. A value may be given several times."""

    plain: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)

    def last(self, name: str) -> str | None:
        return self.values[name][-1] if name in self.values else None

    def rename(self, names: Mapping[str, str]) -> None:
        """What was given under other names counts under ours."""
        for theirs, ours in names.items():
            if theirs in self.values:
                self.values.setdefault(ours, []).extend(self.values.pop(theirs))

    def numbers(self, name: str, kind: type[N], low: float) -> list[N]:
        """Those of a list such as 1,4,16; ConfigError for one below `low`."""
        text = self.last(name) or ""
        try:
            numbers = [kind(part) for part in text.split(",") if part]
        except ValueError:
            numbers = [kind(-1)]
        if any(not number >= low for number in numbers):
            raise ConfigError(
                f"--{name} {text} is not right", remedy=f"Give numbers of {low:g} or more: --{name} 1,4,16"
            )
        return numbers

    def number(self, name: str, kind: type[N], low: float, default: N) -> N:
        numbers = self.numbers(name, kind, low) or [default]
        if len(numbers) > 1:
            raise ConfigError(f"--{name} takes one number", remedy=f"Write --{name} {numbers[0]}")
        return numbers[0]


def read_words(
    command: str, argv: list[str], options: Collection[str], switches: Collection[str], short: Mapping[str, str] = {}
) -> Words:
    """Sort the words; ConfigError for an option that the command does not have. `--` ends the options."""
    out, rest = take_words(argv, options, switches, short)
    for place, word in enumerate(rest):
        if word == "--":
            out.plain += rest[place + 1 :]
            break
        if word.startswith("-") and word != "-":
            flag = word.partition("=")[0]
            raise ConfigError(f"pagoda {command} has no option {flag}", remedy=f"See: pagoda {command} --help")
        out.plain.append(word)
    return out


def take_words(
    argv: list[str], options: Collection[str], switches: Collection[str], short: Mapping[str, str] = {}
) -> tuple[Words, list[str]]:
    """What a command takes for itself, and the rest: plain words, options of others, all from `--` on."""
    out, rest, words = Words(), list[str](), list(argv)
    while words and words[0] != "--":
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = short.get(flag) or (flag[2:].replace("_", "-") if flag.startswith("--") else "")
        if name in switches and not equals:
            out.switches.add(name)
        elif name not in options:
            rest.append(word)
        elif not equals and not words:
            raise ConfigError(f"{flag} needs a value", remedy=f"Write {flag} VALUE")
        else:
            out.values.setdefault(name, []).append(value if equals else words.pop(0))
            while name in _MANY and not equals and words and not words[0].startswith("-"):
                out.values[name].append(words.pop(0))
    return out, rest + words
