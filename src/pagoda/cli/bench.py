"""`pagoda bench`: how fast does a server answer, with how many at once?"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagoda.cli.bench_words import SHAPE_NAMES, dataset_of, shape_of
from pagoda.cli.screen import ProgressLine
from pagoda.cli.words import Words, read_words
from pagoda.errors import ConfigError

if TYPE_CHECKING:
    from pagoda.bench.load import Plan

HELP = """\
Usage: pagoda bench [options]
       pagoda bench latency|throughput --model MODEL ...    without a server; see their --help

Puts load on a server that speaks the OpenAI API (Pagoda or any other) and prints tokens per second and the times to
the first token (TTFT), per token, between chunks (ITL) and to the end of an answer, for each number of requests at
once. Prompts are made up, of the length that is asked for in the server's own tokens, and differ from their first word
on, so that no cache helps where none is measured. Options of `vllm bench serve` work where they mean the same.
The exit code is 1 if a request failed.

Examples:
  pagoda bench                                            1, 4 and 16 at once, 128 tokens in, 128 out
  pagoda bench --concurrency 1,8,32 --input-len 1024 --output-len 64 --plot sweep.svg
  pagoda bench --request-rate 2,4,8 --num-prompts 200 --goodput ttft:500 tpot:50
  pagoda bench --prefix-len 2048 --json result.json       all prompts begin alike
  pagoda bench --base-url http://host:8000 --dataset-path prompts.jsonl

Where:
  --base-url URL            the server (default http://localhost:8000); also --url, or --host and --port
  --model NAME              default: the first that the server lists
  --api-key KEY             or in PAGODA_API_KEY, VLLM_API_KEY, OPENAI_API_KEY
  --backend openai|openai-chat   /v1/completions (the default) or /v1/chat/completions; or --endpoint PATH
  --header NAME=VALUE       one more header
  --ready-check-timeout-sec N    how long to wait for a server that still loads (default 0)
How much:
  --concurrency N,N,...     requests at once, one level after the other; also --max-concurrency
  --request-rate X,X,...    requests per second, arriving at random (Poisson); inf: as fast as answers come
  --burstiness X            1 is Poisson, below 1 burstier, above 1 evener
  --num-prompts N           requests in each level (default: three for each at once, at least 8; 100 at a rate)
  --num-warmups N           requests before that are not counted (default 1)
What is asked:
  --input-len N, --output-len N  tokens (default 128 each); --range-ratio 0.2: up to 20 % more or less
  --prefix-len N            tokens with which prompts begin alike, before --input-len; --num-prefixes N different ones
  --dataset-path FILE       prompts of a file: JSON lines with prompt or messages, ShareGPT's JSON, text lines
  --[no-]ignore-eos         answers of the full length (default: for made-up prompts)
  --temperature X, --extra-body JSON, --seed N
What is told:
  --json FILE, --plot FILE  the numbers, and an SVG; - is the standard output. --save-result, --result-dir,
                            --result-filename as in vLLM; --label TEXT names the run
  --goodput ttft:500 ...    requests per second that keep these limits in ms: ttft, tpot, e2el
  --metric-percentiles 50,90,99
"""

_NAMES = {**SHAPE_NAMES, "max-concurrency": "concurrency", "served-model-name": "model", "endpoint-type": "backend"}
_OPTIONS = (
    "base-url", "url", "host", "port", "model", "api-key", "backend", "endpoint", "header", "ready-check-timeout-sec",
    "concurrency", "request-rate", "burstiness", "num-prompts", "num-warmups", "input-len", "output-len", "range-ratio",
    "prefix-len", "num-prefixes", "dataset-path", "dataset-name", "temperature", "extra-body", "seed", "json", "plot",
    "result-dir", "result-filename", "label", "goodput", "metric-percentiles", "percentile-metrics", "tokenizer",
)  # fmt: skip
_SWITCHES = ("help", "ignore-eos", "no-ignore-eos", "save-result", "disable-tqdm", "trust-remote-code")
_ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
_OFFLINE = ("latency", "throughput")
_GOALS = ("ttft", "tpot", "e2el")


def run(argv: list[str]) -> int:
    if argv and argv[0] in _OFFLINE:
        from pagoda.cli.bench_offline import run as run_offline

        return run_offline(argv)
    words = read_words("bench", argv, (*_OPTIONS, *_NAMES), _SWITCHES, {"-h": "help"})
    if "help" in words.switches:
        print(HELP, end="")
        return 0
    words.rename(_NAMES)
    # `vllm bench serve` is the same measurement.
    if extra := [word for word in words.plain if word != "serve"]:
        remedy = "See: pagoda bench --help"
        if extra[0] == "sweep":
            remedy = "Several levels are one measurement: pagoda bench --concurrency 1,4,16"
        raise ConfigError(f"pagoda bench does not know what {extra[0]} is", remedy=remedy)
    plan = _plan(words)
    import uvloop

    from pagoda.bench.load import measure

    progress = ProgressLine()
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        # In a log, a line for each level would only say what the table says.
        report = uvloop.run(measure(plan, progress if sys.stderr.isatty() else lambda phase, share: None))
    finally:
        progress.clear()
    asked = _asked(plan)
    label = words.last("label") or ""
    report = {"label": label, "date": began, "base_url": plan.url, "what": asked, "seed": plan.seed, **report}
    to_stdout = _write(words, report, plan)
    print(_text(report, plan), file=sys.stderr if to_stdout else sys.stdout)
    return int(any(run["failed"] for run in report["runs"]))


def _plan(words: Words) -> Plan:
    from pagoda.bench.load import Plan

    rates = words.numbers("request-rate", float, 1e-6) or [math.inf]
    levels: list[int | None] = [*words.numbers("concurrency", int, 1)]
    if not levels:
        levels = [1, 4, 16] if rates == [math.inf] else [None]
    return Plan(
        url=words.last("url")
        or words.last("base-url")
        or f"http://{words.last('host') or 'localhost'}:{words.last('port') or 8000}",
        headers=_headers(words),
        endpoint=_endpoint(words),
        model=words.last("model") or "",
        concurrencies=levels,
        rates=rates,
        burstiness=words.number("burstiness", float, 1e-3, 1.0),
        num_prompts=words.number("num-prompts", int, 1, 0) or None,
        shape=shape_of(words),
        dataset=dataset_of(words),
        warmups=words.number("num-warmups", int, 0, 1),
        body=_body(words),
        percentiles=words.numbers("metric-percentiles", float, 0) or [50, 90, 99],
        goals_ms=_goals(words),
        # Another one each time: a server that was measured before would find the same prompts in its cache.
        seed=words.number("seed", int, 0, time.time_ns() % 2**32),
        ready_timeout_s=words.number("ready-check-timeout-sec", float, 0, 0.0),
    )


def _headers(words: Words) -> dict[str, str]:
    variables = ("PAGODA_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY")
    key = words.last("api-key") or next((os.environ[v] for v in variables if os.environ.get(v)), "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for given in words.values.get("header", ()):
        name, equals, value = given.partition("=")
        if not equals or not given.isprintable():
            raise ConfigError(f"--header {given} is not right", remedy="Write --header NAME=VALUE")
        headers[name.strip()] = value.strip()
    return headers


def _endpoint(words: Words) -> str:
    backend = words.last("backend") or "openai"
    if backend not in _ENDPOINTS:
        known = ", ".join(_ENDPOINTS)
        raise ConfigError(f"--backend {backend} is not here", remedy=f"Give one of {known}")
    endpoint = words.last("endpoint") or _ENDPOINTS[backend]
    return endpoint if endpoint.startswith("/") else f"/{endpoint}"


def _body(words: Words) -> dict[str, Any]:
    import json

    body: dict[str, Any] = {}
    made_up = not words.last("dataset-path")
    if "ignore-eos" in words.switches or (made_up and "no-ignore-eos" not in words.switches):
        body["ignore_eos"] = True
    if (temperature := words.last("temperature")) is not None:
        body["temperature"] = words.number("temperature", float, 0, 0.0) if temperature else 0
    try:
        more = json.loads(words.last("extra-body") or "{}")
    except ValueError:
        more = None
    if not isinstance(more, dict):
        raise ConfigError("--extra-body is not a JSON object", remedy="""Write --extra-body '{"top_k": 20}'""")
    return body | more


def _goals(words: Words) -> dict[str, float]:
    goals = {}
    for given in ",".join(words.values.get("goodput", ())).split(","):
        name, colon, limit = given.partition(":")
        try:
            if given:
                goals[name] = float(limit)
        except ValueError:
            colon = ""
        if given and (not colon or name not in _GOALS):
            raise ConfigError(f"--goodput {given} is not right", remedy="Write --goodput ttft:500 tpot:50 e2el:5000")
    return goals


def _asked(plan: Plan) -> str:
    shape = plan.shape
    if plan.dataset:
        return f"prompts of {Path(plan.dataset).name}, at most {shape.output_tokens} tokens out"
    prefix = f"{shape.prefix_tokens} shared + " if shape.prefix_tokens else ""
    spread = f" (+-{shape.spread:.0%})" if shape.spread else ""
    return f"{prefix}{shape.input_tokens} tokens in, {shape.output_tokens} out{spread}"


def _write(words: Words, report: dict[str, Any], plan: Plan) -> bool:
    """The files that were asked for. True if one is the standard output."""
    import json

    from pagoda.bench.plot import svg

    name = words.last("json")
    if name is None and "save-result" in words.switches:
        made = f"{(report['label'] or report['model']).replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        name = str(Path(words.last("result-dir") or ".") / (words.last("result-filename") or made))
    makers: list[tuple[str | None, Callable[[], str]]] = [
        (name, lambda: json.dumps(report, ensure_ascii=False, indent=1) + "\n"),
        (words.last("plot"), lambda: svg(report, plan.percentiles)),
    ]
    for target, make in makers:
        if target == "-":
            sys.stdout.write(make())
        elif target is not None:
            try:
                Path(target).write_text(make(), "utf-8")
            except OSError as error:
                raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
    return any(target == "-" for target, _ in makers)


def _text(report: dict[str, Any], plan: Plan) -> str:
    shares = [f"p{share:g}" for share in plan.percentiles]
    level = "rate" if any(run["request_rate"] for run in report["runs"]) else "at once"
    heads = [level, "req/s", "out tok/s", "tok/s", *_columns("TTFT ms", shares), "ms/token"]
    heads += [*_columns("ITL ms", shares), *_columns("end s", shares)]
    heads += [*(["good/s"] if plan.goals_ms else []), "failed"]
    rows = [heads, *(_row(run, shares, bool(plan.goals_ms)) for run in report["runs"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = [f"\n{report['model']} at {plan.url}: {report['what']}\n"]
    return "\n".join([*notes, *lines, *_remarks(report), ""])


def _columns(name: str, shares: list[str]) -> list[str]:
    return [f"{name} {share}" if i == 0 else share for i, share in enumerate(shares)]


def _row(run: dict[str, Any], shares: list[str], goals: bool) -> list[str]:
    rate = "" if run["request_rate"] is None else f"{run['request_rate']:g}/s"
    level = " ".join(filter(None, [rate, str(run["max_concurrency"] or "")])) or "all"
    row = [level, f"{run['request_throughput']:.2f}", f"{run['output_throughput']:.1f}"]
    row.append(f"{run['total_token_throughput']:.1f}")
    spread = {name: [f"{share}_{name}_ms" for share in shares] for name in ("ttft", "itl", "e2el")}
    times = ((spread["ttft"], 1, 0), (["mean_tpot_ms"], 1, 1), (spread["itl"], 1, 1), (spread["e2el"], 1000, 2))
    for keys, unit, digits in times:
        values = (run.get(key) for key in keys)
        row += ["-" if value is None else f"{value / unit:.{digits}f}" for value in values]
    return [*row, *([f"{run['request_goodput']:.2f}"] if goals else []), str(run["failed"])]


def _remarks(report: dict[str, Any]) -> list[str]:
    """What one must know to read the table rightly."""
    runs, remarks = report["runs"], []
    for run in runs:
        remarks += [f"failed: {error}" for error in run.get("errors", ())]
    if (cached := sum(run["cached_tokens"] for run in runs)) > 0:
        total = max(1, sum(run["total_input_tokens"] for run in runs))
        remarks.append(f"{cached / total:.0%} of the prompts' tokens came from the server's prefix cache")
    if any(run["client_cpu_s"] > max(0.5, 0.7 * run["duration"]) for run in runs):
        remarks.append("this program needed most of a processor core: the server may be faster than it seems")
    return ["", *dict.fromkeys(remarks)] if remarks else []
