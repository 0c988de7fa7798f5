"""Reads the few options of a small command: names with values, switches, and plain words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pagoda.errors import ConfigError

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


def read_words(
    command: str, argv: list[str], options: Collection[str], switches: Collection[str], short: Mapping[str, str] = {}
) -> Words:
    """Sort the words; ConfigError for an option that the command does not have. `--` ends the options."""
    out, rest = Words(), list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            out.plain += rest
            break
        if not word.startswith("-") or word == "-":
            out.plain.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = short.get(flag, flag.removeprefix("--").replace("_", "-"))
        if name in switches and not equals:
            out.switches.add(name)
        elif name not in options:
            raise ConfigError(f"pagoda {command} has no option {flag}", remedy=f"See: pagoda {command} --help")
        elif not equals and not rest:
            raise ConfigError(f"{flag} needs a value", remedy=f"See: pagoda {command} --help")
        else:
            out.values.setdefault(name, []).append(value if equals else rest.pop(0))
            while name in _MANY and not equals and rest and not rest[0].startswith("-"):
                out.values[name].append(rest.pop(0))
    return out
