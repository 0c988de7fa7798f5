"""`pagoda top`: how busy running servers are, as a table that is drawn anew."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from pagoda.cli.screen import size
from pagoda.cli.words import read_words
from pagoda.deploy.service.scrape import CannotAsk, Sample, sample
from pagoda.errors import ConfigError

HELP = """\
Usage: pagoda top [URL ...] [options]

Shows what servers do: requests, tokens per second, cache, memory, for each model. Ctrl-C ends it. The default URL is
http://localhost:8000; a port alone is enough.

Examples:
  pagoda top
  pagoda top 8000 8001 http://gpu1:8000
  pagoda top --once --json

Options:
  --interval S    seconds between two looks (default 2)
  --once          print one table, measured over one interval (then 1), and end
  --json          with --once: for a program

Variable: PAGODA_API_KEY (for servers that ask for a key)
"""
HEADS = ("MODEL", "RUN", "WAIT", "TOK/S", "PROMPT/S", "CACHE", "HITS", "FIRST", "NEXT", "MEMORY", "ENDED")
_HOME, _CLEAR_REST, _CLEAR_LINE = "\x1b[H", "\x1b[J", "\x1b[K"


@dataclasses.dataclass(frozen=True)
class Row:
    """One model between two looks. Times are means of the calls in between; None where there were none."""

    url: str
    model: str
    running: int = 0
    waiting: int = 0
    tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    cache_share: float = 0.0
    prefix_hit_share: float | None = None
    first_token_s: float | None = None
    next_token_s: float | None = None
    memory_bytes: int = 0
    ended: int = 0
    error: str = ""


def run(argv: list[str]) -> int:
    """The command; the result is the exit code."""
    words = read_words("top", argv, ("interval",), ("help", "once", "json"), {"-h": "help"})
    if "help" in words.switches:
        print(HELP, end="")
        return 0
    once = "once" in words.switches
    interval_s = _interval_s(words.last("interval") or ("1" if once else "2"))
    urls = [address(word) for word in words.plain or ["8000"]]
    key = os.environ.get("PAGODA_API_KEY", "").split(",")[0]
    before = look(urls, key)
    if once:
        time.sleep(interval_s)
        rows = compare(before, look(urls, key))
        print(
            json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if "json" in words.switches else text(rows)
        )
        return 69 if all(row.error for row in rows) else 0
    return _live(urls, key, before, interval_s)


def _live(urls: Sequence[str], key: str, before: dict[str, Sample | str], interval_s: float) -> int:
    drawn = sys.stdout.isatty()
    if drawn:
        print("\x1b[2J", end="")
    try:
        while True:
            time.sleep(interval_s)
            now = look(urls, key)
            shown = f"{time.strftime('%H:%M:%S')}  pagoda top, every {interval_s:g} s\n\n{text(compare(before, now))}"
            if drawn:
                lines = "\n".join(line[: os.get_terminal_size().columns] + _CLEAR_LINE for line in shown.split("\n"))
                print(f"{_HOME}{lines}\n{_CLEAR_REST}", end="", flush=True)
            else:
                print(f"{shown}\n", flush=True)
            before = now
    except KeyboardInterrupt:
        return 0


def _interval_s(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise ConfigError(
            f"--interval {given} is no number of seconds from 0.1 to 3600", remedy="Such as: --interval 2"
        )
    return seconds


def address(word: str) -> str:
    """A port, a host and port, or a whole URL (with or without /v1)."""
    if word.isdigit():
        word = f"localhost:{word}"
    url = word if "://" in word else f"http://{word}"
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise ConfigError(f"{word} is no address of a server", remedy="Such as: pagoda top http://localhost:8000")
    return url.rstrip("/").removesuffix("/v1")


def look(urls: Sequence[str], key: str) -> dict[str, Sample | str]:
    """The metrics of each server, or why there are none."""
    out: dict[str, Sample | str] = {}
    for url in urls:
        try:
            out[url] = sample(url, key)
        except CannotAsk as error:
            out[url] = str(error)
    return out


def compare(before: dict[str, Sample | str], now: dict[str, Sample | str]) -> list[Row]:
    """A row for each model of each server."""
    rows: list[Row] = []
    for url, new in now.items():
        old = before[url]
        if isinstance(new, str):
            rows.append(Row(url, "-", error=new))
        else:
            start = new if isinstance(old, str) else old
            rows += [_row(url, model, start, new) for model in new.models]
    return rows


def _row(url: str, model: str, old: Sample, new: Sample) -> Row:
    def grown(name: str) -> float:
        return max(0.0, new.get(name, model) - old.get(name, model))

    def mean(histogram: str) -> float | None:
        count = grown(f"{histogram}_count")
        return grown(f"{histogram}_sum") / count if count else None

    looked_up = grown("vllm:prefix_cache_queries_total")
    return Row(
        url,
        model,
        running=int(new.get("vllm:num_requests_running", model)),
        waiting=int(new.get("vllm:num_requests_waiting", model)),
        tokens_per_s=new.rate("vllm:generation_tokens_total", old, model),
        prompt_tokens_per_s=new.rate("vllm:prompt_tokens_total", old, model),
        cache_share=new.get("vllm:kv_cache_usage_perc", model) / max(1, new.engines.get(model, 1)),
        prefix_hit_share=grown("vllm:prefix_cache_hits_total") / looked_up if looked_up else None,
        first_token_s=mean("vllm:time_to_first_token_seconds"),
        next_token_s=mean("vllm:inter_token_latency_seconds"),
        memory_bytes=int(
            new.get("process_resident_memory_bytes")  # of the server; behind a gateway each model has one of its own
            + new.get("process_resident_memory_bytes", model)
            + new.get("pagoda:engine_resident_memory_bytes", model)
        ),
        ended=int(new.get("vllm:request_success_total", model)),
    )


def text(rows: Sequence[Row]) -> str:
    """The table; below it the servers that do not answer."""
    silent = [row.error for row in rows if row.error]
    if len(silent) == len(rows):
        return "\n".join(silent)
    cells = [HEADS, *(_cells(row) for row in rows if not row.error)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADS))]
    lines = [
        "  ".join(
            word.ljust(width) if i == 0 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join([*lines, *silent])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model if len(row.model) <= 40 else f"...{row.model[-37:]}",
        str(row.running),
        str(row.waiting),
        f"{row.tokens_per_s:.1f}",
        f"{row.prompt_tokens_per_s:.1f}",
        f"{row.cache_share:.0%}",
        _share(row.prefix_hit_share),
        _time(row.first_token_s),
        _time(row.next_token_s),
        size(row.memory_bytes),
        str(row.ended),
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"
