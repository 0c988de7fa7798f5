"""`pagoda bench latency` and `pagoda bench throughput`: how fast is a model in this process, without a server?"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pagoda.cli.bench_words import SHAPE_NAMES, dataset_of, shape_of
from pagoda.cli.inputs import load, split
from pagoda.cli.model import local_model
from pagoda.cli.screen import ProgressLine
from pagoda.cli.words import Words, take_words
from pagoda.errors import ConfigError
from pagoda.options.check import check
from pagoda.options.resolve import DEFAULT

if TYPE_CHECKING:
    from pagoda.bench.offline import Ask
    from pagoda.bench.prompts import Shape
    from pagoda.engine.llm import LLM

LATENCY_HELP = """\
Usage: pagoda bench latency --model MODEL [options] [options of serve]

Computes the same batch of made-up prompts again and again in this process, without a server, and prints how long it
takes: on average, and the percentiles. Options, the printed lines and the file are those of vllm bench latency. The
prefix cache is off unless --enable-prefix-caching is given.

Example:
  pagoda bench latency --model ./qwen3-0.6b --batch-size 1 --input-len 512 --output-len 64

Options:
  --input-len N, --output-len N     tokens of each prompt (default 32) and each answer (default 128)
  --batch-size N                    prompts at once (default 8); --n N: answers to each
  --num-iters N                     how often it is measured (default 30)
  --num-iters-warmup N              how often it is computed before that (default 10)
  --use-beam-search                 with --n beams
  --output-json FILE                the numbers
  --seed N                          other prompts
  all options of serve that concern the model, the machine and the scheduling: pagoda serve --help
"""

THROUGHPUT_HELP = """\
Usage: pagoda bench throughput --model MODEL [options] [options of serve]

Computes many prompts in this process, without a server, all at once and as fast as they go, and prints requests and
tokens per second. Options, the printed lines and the file are those of vllm bench throughput.

Examples:
  pagoda bench throughput --model ./qwen3-0.6b --input-len 512 --output-len 64 --num-prompts 200
  pagoda bench throughput --model ./qwen3-0.6b --dataset-path ShareGPT.json --backend vllm-chat

Options:
  --input-len N, --output-len N     tokens of each prompt and each answer (default 128 each)
  --random-range-ratio 0.2          up to 20 % more or less
  --prefix-len N                    tokens with which prompts begin alike, before --input-len; --num-prefixes N
  --num-prompts N                   default 1000; --num-warmups N: before the time is taken (default 0)
  --n N                             answers to each prompt
  --dataset-path FILE               prompts of a file: JSON lines with prompt or messages, ShareGPT's JSON, text lines;
                                    again from the first where they are too few (not with --no-oversample)
  --backend vllm|vllm-chat          the text as it is (the default), or through the chat template
  --lora-path FOLDER                all prompts with this adapter
  --output-json FILE                the numbers
  --seed N                          other prompts
  all options of serve that concern the model, the machine and the scheduling: pagoda serve --help
"""

_BOTH = ("input-len", "output-len", "n", "output-json", "seed")
_LATENCY = (*_BOTH, "batch-size", "num-iters", "num-iters-warmup")
_THROUGHPUT = (
    *_BOTH, *SHAPE_NAMES, "range-ratio", "prefix-len", "num-prefixes", "num-prompts", "num-warmups", "dataset-name",
    "dataset-path", "backend", "lora-path",
)  # fmt: skip
_SWITCHES = MappingProxyType({"latency": ("use-beam-search",), "throughput": ("no-oversample",)})
_NOTES = {
    "disable-detokenize": "text is made of every answer, which is part of the time",
    "async-engine": "the engine is in this process in any case",
    "prequeue-requests": "all prompts are queued before the first step in any case",
}


def run(argv: list[str]) -> int:
    """`argv` begins with the word that says which of the two."""
    kind, *argv = argv
    options = _LATENCY if kind == "latency" else _THROUGHPUT
    switches = (*_NOTES, *_SWITCHES[kind])
    words, rest = take_words(argv, options, switches)
    words.rename(SHAPE_NAMES)
    if split(rest).help is not None:
        print(LATENCY_HELP if kind == "latency" else THROUGHPUT_HELP, end="")
        return 0
    for name in sorted(words.switches & set(_NOTES)):
        print(f"--{name}: {_NOTES[name]}", file=sys.stderr)
    model, table, lines = (_latency if kind == "latency" else _throughput)(words, rest)
    print("\n".join(lines))
    if target := words.last("output-json"):
        try:
            Path(target).write_text(json.dumps({"model_id": model, **table}, indent=4) + "\n", "utf-8")
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror}", remedy="See --output-json") from None
    return 0


Result = tuple[str, dict[str, Any], list[str]]


def _latency(words: Words, rest: list[str]) -> Result:
    from pagoda.bench.offline import check_room, latencies_s, latency_table, made_up_ids
    from pagoda.bench.prompts import Shape, take

    shape = Shape(words.number("input-len", int, 1, 32), words.number("output-len", int, 1, 128))
    batch_size, n = words.number("batch-size", int, 1, 8), words.number("n", int, 1, 1)
    iterations, warmups = words.number("num-iters", int, 1, 30), words.number("num-iters-warmup", int, 0, 10)
    model, llm = _load(words, rest, {"enable_prefix_caching": False})
    progress = ProgressLine()
    with llm:
        check_room(llm, shape.input_tokens + shape.output_tokens)
        batch = take(made_up_ids(llm, shape, _rng(words)), batch_size)
        try:
            took_s = latencies_s(
                llm, batch, n=n, beams="use-beam-search" in words.switches, iterations=iterations, warmups=warmups,
                on_progress=progress if sys.stderr.isatty() else lambda phase, share: None,
            )  # fmt: skip
        finally:
            progress.clear()
    table = latency_table(took_s)
    shares = [f"{share}% percentile latency: {took} seconds" for share, took in table["percentiles"].items()]
    return model, table, [f"Avg latency: {table['avg_latency']} seconds", *shares]


def _throughput(words: Words, rest: list[str]) -> Result:
    from pagoda.bench.offline import throughput

    backend = words.last("backend") or "vllm"
    if backend not in ("vllm", "vllm-chat"):
        raise ConfigError(f"--backend {backend} is not here", remedy="Give vllm or vllm-chat")
    shape, n = shape_of(words), words.number("n", int, 1, 1)
    count, warmups = words.number("num-prompts", int, 1, 1000), words.number("num-warmups", int, 0, 0)
    adapters: dict[str, Any] = {"enable_lora": True} if words.last("lora-path") else {}
    model, llm = _load(words, rest, adapters)
    show = sys.stderr.isatty()
    with llm:
        warm, asks = _asks(words, llm, shape, warmups, count)
        if warm:
            throughput(llm, warm, n=n, show=show)
        found = throughput(llm, asks, n=n, show=show)
    table = found.table()
    rates = f"{table['requests_per_second']:.2f} requests/s, {table['tokens_per_second']:.2f} total tokens/s"
    return model, table, [
        f"Throughput: {rates}, {found.output_tokens / found.elapsed_s:.2f} output tokens/s",
        f"Total num prompt tokens:  {found.prompt_tokens}",
        f"Total num output tokens:  {found.output_tokens}",
    ]  # fmt: skip


def _asks(words: Words, llm: LLM, shape: Shape, warmups: int, count: int) -> tuple[list[Ask], list[Ask]]:
    """Those before the time is taken, and those that are measured."""
    from pagoda.bench.offline import asks_of_file, check_room, made_up_ids
    from pagoda.bench.prompts import take
    from pagoda.engine.llm_adapters import LoRARequest

    chat = words.last("backend") == "vllm-chat"
    if path := dataset_of(words):
        asks = asks_of_file(llm, path, shape.output_tokens, chat=chat)
        if "no-oversample" in words.switches or words.last("num-prompts") is None:
            count = min(count, len(asks))
        warm, asks = take(itertools.cycle(asks), warmups), take(itertools.cycle(asks), count)
    else:
        if chat:
            raise ConfigError("--backend vllm-chat needs conversations", remedy="Give them with --dataset-path FILE")
        longest = (1 + shape.spread) * (shape.input_tokens + shape.output_tokens)
        check_room(llm, shape.prefix_tokens + math.ceil(longest))
        made = made_up_ids(llm, shape, _rng(words))
        warm, asks = take(made, warmups), take(made, count)
    if folder := words.last("lora-path"):
        adapter = LoRARequest("bench", 1, folder)
        warm, asks = ([replace(ask, adapter=adapter) for ask in each] for each in (warm, asks))
    return warm, asks


def _load(words: Words, rest: list[str], defaults: Mapping[str, Any]) -> tuple[str, LLM]:
    """The model as it was named, and loaded; `defaults` count where the user says nothing."""
    from pagoda.engine.llm import LLM
    from pagoda.observe import setup_logging

    settings = load(split(rest), os.environ)
    check(settings)
    options = settings.options
    setup_logging(options.log_level)
    path = local_model(options)
    given = {name: getattr(options, name) for name, origin in settings.origins.items() if origin != DEFAULT}
    return options.model or path, LLM(path, seed=_seed(words), vllm_kwargs={**defaults, **given})


def _seed(words: Words) -> int:
    return words.number("seed", int, 0, 0)


def _rng(words: Words) -> random.Random:
    return random.Random(_seed(words))
