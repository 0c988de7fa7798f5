"""What the commands draw: one progress line, and small tables. Plain text, so that a log file can hold it too."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

WIDTH = 30
_ERASE_LINE = "\r\x1b[2K"


class ProgressLine:
    """One line that fills while something loads; in a log file it is one line for each phase instead."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._live = self._out.isatty()
        self._shown = ""

    def __call__(self, phase: str, share: float, note: str = "") -> None:
        full = round(WIDTH * max(0.0, min(1.0, share)))
        bar = f"{phase:<12} [{'#' * full}{'.' * (WIDTH - full)}] {share:4.0%} {note}".rstrip()
        line = bar if self._live else f"loading: {phase}"
        if line != self._shown:
            self._out.write(f"{_ERASE_LINE}{line}" if self._live else f"{line}\n")
            self._out.flush()
            self._shown = line

    def clear(self) -> None:
        """Take the line away; what is printed next begins at the left."""
        if self._live and self._shown:
            self._out.write(_ERASE_LINE)
            self._out.flush()
        self._shown = ""


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns, the left one padded."""
    pairs = list(rows)
    width = max((len(left) for left, _ in pairs), default=0)
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in pairs)


def size(count_bytes: int) -> str:
    """A size for people: 98 MiB, 1.4 GiB."""
    if count_bytes < 2**30:
        return f"{round(count_bytes / 2**20)} MiB"
    return f"{count_bytes / 2**30:.1f} GiB"
