"""Draws findings in the terminal: one line each, its cure below it, and the words that belong to a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pagoda.deploy.findings import Finding, columns, problems, report
from pagoda.errors import ConfigError

_MARKS = {"ok": "  ok", "note": "note", "problem": "FAIL"}
_COLORS = {"ok": "32", "note": "33", "problem": "31"}


def show(findings: Iterable[Finding], verdicts: tuple[str, str], *, as_json: bool, **more: Any) -> int:
    """Print them; the exit code is 1 if one is a problem. `verdicts`: the last line without and with problems."""
    items = list(findings)
    failed = problems(items)
    if as_json:
        print(json.dumps(report(items, **more), ensure_ascii=False, indent=2))
        return int(failed > 0)
    color = sys.stdout.isatty()
    width = max((columns(item.topic) for item in items), default=0)
    for item in items:
        mark = f"\x1b[{_COLORS[item.level]}m{_MARKS[item.level]}\x1b[0m" if color else _MARKS[item.level]
        topic = item.topic + " " * (width - columns(item.topic))
        print(f"{mark}  {topic}  {item.text}")
        if item.cure and item.level != "ok":
            print(f"{'':<6}{'':<{width}}  -> {item.cure}")
    print(f"\n{verdicts[1].format(count=failed) if failed else verdicts[0]}")
    return int(failed > 0)


def take(words: Sequence[str], switches: Iterable[str], values: Iterable[str] = ()) -> tuple[dict[str, str], list[str]]:
    """Take a command's own options out of its words: what was given, and the words that are left."""
    given: dict[str, str] = {}
    rest: list[str] = []
    known, valued = set(switches), set(values)
    queue = list(words)
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("_", "-") if flag.startswith("--") else flag
        if word in ("-h", "--help"):
            given["help"] = ""
        elif flag.startswith("--") and name in known and not equals:
            given[name] = ""
        elif flag.startswith("--") and name in valued:
            if not equals and (not queue or queue[0].startswith("--")):
                raise ConfigError(f"--{name} needs a value", remedy=f"Write --{name} VALUE")
            given[name] = value if equals else queue.pop(0)
        else:
            rest.append(word)
    return given, rest


def only(rest: Sequence[str], most: int, command: str) -> None:
    """Refuse words that a command does not know."""
    unknown = [word for word in rest if word.startswith("-") and word != "-"]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]}", remedy=f"See: pagoda {command} --help")
    if len(rest) > most:
        raise ConfigError(f"one word too many: {rest[most]}", remedy=f"See: pagoda {command} --help")
