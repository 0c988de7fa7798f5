"""What `pagoda check` and `pagoda doctor` say: findings, each one line, with the cure where there is one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pagoda.errors import PagodaError

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`problem` means that serving would fail; `note` is worth knowing. `cure` is what to type or change, or ''."""

    level: Level
    topic: str
    text: str
    cure: str = ""


def ok(topic: str, text: str) -> Finding:
    return Finding("ok", topic, text)


def note(topic: str, text: str, cure: str = "") -> Finding:
    return Finding("note", topic, text, cure)


def problem(topic: str, text: str, cure: str = "") -> Finding:
    return Finding("problem", topic, text, cure)


def of_error(topic: str, error: PagodaError) -> Finding:
    return problem(topic, error.message, error.remedy)


def problems(findings: Iterable[Finding]) -> int:
    return sum(finding.level == "problem" for finding in findings)


def columns(text: str) -> int:
    """Its width in a terminal: a Chinese character takes two columns."""
    return sum(2 if ord(char) > 0x2E7F else 1 for char in text)


def report(findings: Iterable[Finding], **more: Any) -> dict[str, Any]:
    """The findings as a table for JSON."""
    items = list(findings)
    return {**more, "ok": not problems(items), "findings": [asdict(item) for item in items]}
