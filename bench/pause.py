#!/usr/bin/env python3
"""How long do running streams stop when a long prompt comes in? Works with any OpenAI-compatible server; prints JSON.

    python bench/pause.py --base-url http://127.0.0.1:8000

Streams run, then a prompt of --prompt tokens arrives: the longest gap between two chunks of the running streams while
it is read, and before, and the time to the long prompt's first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

from pagoda.bench.http import Client
from pagoda.bench.prompts import text_of
from pagoda.bench.result import Answer, percentile, read


async def ask(client: Client, model: str, words: int, output: int) -> Answer:
    body = {"model": model, "prompt": text_of(random.Random(time.time_ns()), words), "max_tokens": output}
    body |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    answer = read(await client.send(client.request("POST", "/v1/completions", json.dumps(body).encode())))
    if answer.error:
        raise SystemExit(answer.error)
    return answer


async def pause(client: Client, a: argparse.Namespace) -> dict[str, float]:
    running = [asyncio.create_task(ask(client, a.model, 128, a.output)) for _ in range(a.streams)]
    await asyncio.sleep(a.after)
    late = await ask(client, a.model, a.prompt, 1)
    done = await asyncio.gather(*running)
    end = late.times_s[0]
    gaps = [(at, gap) for r in done for at, gap in zip(r.times_s[1:], r.gaps_s(), strict=True)]
    during = sorted(gap for at, gap in gaps if late.start_s <= at and at - gap <= end)
    before = sorted(gap for at, gap in gaps if at < late.start_s)
    if not during or not before:
        raise SystemExit("the streams ended before the prompt came: give a larger --output or a smaller --after")
    seconds = {
        "pause_ms": during[-1],
        "pause_ms_p50": percentile(during, 50),
        "itl_ms_p50": percentile(before, 50),
        "itl_ms_max": before[-1],
        "long_ttft_ms": end - late.start_s,
    }
    return {**{k: round(v * 1000, 2) for k, v in seconds.items()}, "long_prompt_tokens": late.prompt_tokens}


async def measure(a: argparse.Namespace) -> dict[str, Any]:
    client = Client(a.base_url, {}, 600)
    try:
        if not a.model:
            a.model = json.loads((await client.send(client.request("GET", "/v1/models"))).body)["data"][0]["id"]
        await ask(client, a.model, 128, 16)
        runs = [await pause(client, a) for _ in range(a.repeats)]
        return {"runs": runs, "median": {k: statistics.median(r[k] for r in runs) for k in runs[0]}}
    finally:
        client.close()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base-url", default="http://127.0.0.1:8000")
    p.add_argument("--model", default="")
    p.add_argument("--streams", type=int, default=1)
    p.add_argument("--prompt", type=int, default=2000, help="words of the long prompt, about as many tokens")
    p.add_argument("--output", type=int, default=400)
    p.add_argument("--after", type=float, default=0.6, help="seconds before the long prompt is sent")
    p.add_argument("--repeats", type=int, default=3)
    print(json.dumps(asyncio.run(measure(p.parse_args())), indent=1))


if __name__ == "__main__":
    main()
