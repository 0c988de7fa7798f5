"""Logs: one readable line per event, to the terminal's error stream and, where wanted, to a file that rotates."""

from __future__ import annotations

import logging
import logging.handlers
import re
import sys
from pathlib import Path

from pagoda.errors import ConfigError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_requests = logging.getLogger("pagoda.request")


def printable(text: str) -> str:
    """The text with its control characters written as escapes: what clients send must not forge log lines."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


class OneLine(logging.Formatter):
    """`2026-01-31 12:00:00 info  message`; a traceback follows as lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(level)-7s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.level = record.levelname.lower()
        record.message = printable(record.message)
        return super().formatMessage(record)


def setup_logging(
    level: str = "info", file: str | None = None, file_bytes: int = 20_000_000, files_kept: int = 5
) -> None:
    """Send all logs to stderr, and to `file` if given, which rotates. May be called again: the last call counts."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        handlers.append(_rotating(Path(file).expanduser(), file_bytes, files_kept))
    for handler in handlers:
        handler.setFormatter(OneLine())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level.upper())
    # Libraries tell of every connection; only what went wrong there is news here.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _rotating(path: Path, file_bytes: int, files_kept: int) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return logging.handlers.RotatingFileHandler(path, maxBytes=file_bytes, backupCount=files_kept, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--log-file: {path} cannot be written: {error.strerror}", remedy="Name a file in a folder of yours"
        ) from None


def log_request(
    request_id: str,
    *,
    model: str,
    status: int,
    prompt_tokens: int,
    cached_tokens: int,
    completion_tokens: int,
    first_token_s: float | None,
    total_s: float,
    finish: str,
) -> None:
    """One line about a request that is over: sizes and times, never its text."""
    first = "-" if first_token_s is None else f"{first_token_s * 1e3:.0f}ms"
    _requests.info(
        "%s %s %d prompt=%d cached=%d completion=%d first_token=%s total=%.0fms finish=%s",
        request_id,
        model,
        status,
        prompt_tokens,
        cached_tokens,
        completion_tokens,
        first,
        total_s * 1e3,
        finish,
    )
