"""`pagoda pull`: fetches a model from Hugging Face or ModelScope, and says where it is."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pagoda.cli.screen import ProgressLine, size
from pagoda.cli.words import read_words
from pagoda.deploy.download.pull import Pulled, Report, Wanted, pull, wanted
from pagoda.deploy.download.transfer import Progress
from pagoda.errors import ConfigError

HELP = """\
Usage: pagoda pull NAME [options]

Fetches a model. NAME is owner/name as on the hub; a GGUF repository may need owner/name:FILE.gguf or
owner/name:Q4_K_M. A pull that was interrupted goes on where it was, also from another source; each file is checked
by its hash before it appears. What is printed last is the folder.

Examples:
  pagoda pull Qwen/Qwen3-0.6B
  pagoda pull Qwen/Qwen3-0.6B --source modelscope --local-dir ./qwen3-0.6b
  HF_ENDPOINT=https://hf-mirror.com pagoda pull Qwen/Qwen3-0.6B

Options:
  --source NAME[,NAME]    huggingface, modelscope, hf-mirror or an address; tried in order (default: huggingface,
                          at HF_ENDPOINT first if that is set, then modelscope)
  --revision REVISION     branch, tag or commit
  --local-dir DIR         put the files there, under their own names, and not into the cache
  --include PATTERN       only files whose path matches, such as '*.json'; may be repeated
  --exclude PATTERN       not those
  --token-to-mirror       send HF_TOKEN or MODELSCOPE_API_TOKEN to an HF_ENDPOINT or MODELSCOPE_ENDPOINT of your own

Without --include: safetensors where there are some, else one GGUF file, else pytorch_model.bin (read without running
what is in it); tokenizer and configuration; never code.

Variables: HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE, MODELSCOPE_CACHE, MODELSCOPE_ENDPOINT,
MODELSCOPE_API_TOKEN, HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE
"""
# The last of each are huggingface-cli's, in many guides: what they ask for is always so.
OPTIONS = ("source", "revision", "local-dir", "include", "exclude", "local-dir-use-symlinks")
SWITCHES = ("help", "token-to-mirror", "resume-download")


def run(argv: list[str]) -> int:
    """The command; the result is the exit code."""
    words = read_words("pull", argv, OPTIONS, SWITCHES, {"-h": "help"})
    if "help" in words.switches:
        print(HELP, end="")
        return 0
    if len(words.plain) != 1:
        raise ConfigError("pagoda pull needs the name of one model", remedy="Such as: pagoda pull Qwen/Qwen3-0.6B")
    local_dir = words.last("local-dir")
    want = dataclasses.replace(
        wanted(words.plain[0]),
        source=words.last("source") or "auto",
        revision=words.last("revision"),
        local_dir=Path(local_dir).expanduser() if local_dir else None,
        include=tuple(words.values.get("include", ())),
        exclude=tuple(words.values.get("exclude", ())),
        token_to_mirror="token-to-mirror" in words.switches,
    )
    done = fetch(want)
    print(done.folder)
    return 0


def fetch(want: Wanted, environ: Mapping[str, str] = os.environ) -> Pulled:
    """Pull with a progress line and, at the end, a line about what was done."""
    line = ProgressLine()
    meter = Meter()

    def say(text: str) -> None:
        line.clear()
        print(text, file=sys.stderr, flush=True)

    def show(progress: Progress) -> None:
        if progress.total_bytes:
            line("download", progress.done_bytes / progress.total_bytes, meter(progress))

    started_s = time.monotonic()
    try:
        done = pull(want, environ, Report(show, say))
    finally:
        line.clear()
    seconds = time.monotonic() - started_s
    if done.bytes_got:
        got = f"{size(done.bytes_got)} fetched in {seconds:.0f} s"
        say(f"{size(done.total_bytes)} from {done.source}, {got}, all verified")
    else:
        say(f"{size(done.total_bytes)}, all there already")
    return done


class Meter:
    """Speed over the last seconds, and the time that is left at that speed."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def __call__(self, progress: Progress) -> str:
        now_s = time.monotonic()
        self._seen = [(at, got) for at, got in self._seen if now_s - at < 10] + [(now_s, progress.bytes_got)]
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        text = f"{size(progress.done_bytes)} of {size(progress.total_bytes)}"
        if last_s - first_s < 0.5:
            return text
        speed = (last - first) / (last_s - first_s)
        if speed < 1:
            return f"{text}, waiting"
        left_s = round((progress.total_bytes - progress.done_bytes) / speed)
        clock = (
            f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02}"
            if left_s >= 3600
            else f"{left_s // 60}:{left_s % 60:02}"
        )
        return f"{text}, {speed / 1e6:.1f} MB/s, {clock} left"
