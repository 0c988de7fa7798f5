"""Puts load on a server: at a time, at a rate, or both; every level of a sweep after the other."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pagoda.bench.http import Client, Exchange
from pagoda.bench.prompts import Prompt, Scale, Shape, from_file, made_up, scale_of, take, text_of
from pagoda.bench.result import read, reason, summary
from pagoda.errors import EngineError

Progress = Callable[[str, float], None]
_PROBE_WORDS = (16, 64)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole measurement. Each of `rates` (requests per second) is tried with each of `concurrencies` (None: all)."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    endpoint: str = "/v1/completions"
    model: str = ""
    concurrencies: Sequence[int | None] = (1,)
    rates: Sequence[float] = (math.inf,)
    burstiness: float = 1.0
    num_prompts: int | None = None
    shape: Shape = field(default_factory=Shape)
    dataset: str = ""
    warmups: int = 1
    body: Mapping[str, Any] = field(default_factory=dict)
    percentiles: Sequence[float] = (50, 90, 99)
    goals_ms: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    timeout_s: float = 600.0
    ready_timeout_s: float = 0.0

    @property
    def chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")


async def measure(plan: Plan, on_progress: Progress) -> dict[str, Any]:
    """Run it; gives the server's model and a summary for each level."""
    client = Client(plan.url, plan.headers, plan.timeout_s)
    rng = random.Random(plan.seed)
    try:
        model = await _model(client, plan)
        dataset = from_file(plan.dataset, plan.shape.output_tokens) if plan.dataset else []
        scale = Scale() if dataset else await _scale(client, plan, model, rng)
        prompts = itertools.cycle(dataset) if dataset else made_up(plan.shape, scale, rng)
        warm = [_request(client, plan, model, prompt) for prompt in take(prompts, plan.warmups)]
        for request in warm:
            await client.send(request)
        runs = []
        for rate, concurrency in itertools.product(plan.rates, plan.concurrencies):
            count = plan.num_prompts or len(dataset) or (max(8, 3 * concurrency) if concurrency else 100)
            requests = [_request(client, plan, model, prompt) for prompt in take(prompts, count)]
            runs.append(await _level(client, plan, requests, rate, concurrency, rng, on_progress))
        return {"model": model, "runs": runs}
    finally:
        client.close()


def _request(client: Client, plan: Plan, model: str, prompt: Prompt, **more: Any) -> bytes:
    asked: dict[str, Any] = {"prompt": prompt.text}
    if plan.chat:
        asked = {"messages": prompt.messages or [{"role": "user", "content": prompt.text}]}
    body = {"model": model, **asked, "max_tokens": prompt.output_tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, **plan.body, **more}
    return client.request("POST", plan.endpoint, json.dumps(body).encode())


async def _model(client: Client, plan: Plan) -> str:
    """The model that is named, or the first that the server lists, once it answers."""
    until_s = time.monotonic() + plan.ready_timeout_s
    while True:
        exchange = await client.send(client.request("GET", "/v1/models"))
        busy = exchange.error or exchange.status == 503
        if not busy or time.monotonic() >= until_s:
            break
        await asyncio.sleep(0.5)
    if exchange.error:
        remedy = "Start one with: pagoda serve  or name another with --base-url"
        raise EngineError(f"There is no server at {plan.url}: {exchange.error}", remedy=remedy)
    if plan.model:
        return plan.model
    try:
        return str(json.loads(exchange.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        text = f"The server at {plan.url} names no model ({exchange.status}: {reason(exchange.body)})"
        raise EngineError(text, remedy="Name it with --model, and its key with --api-key") from None


async def _scale(client: Client, plan: Plan, model: str, rng: random.Random) -> Scale:
    """Learn from two small requests how many tokens the server counts for a word, and that it answers at all."""
    counted = []
    for words in _PROBE_WORDS:
        exchange = await client.send(_request(client, plan, model, Prompt(text_of(rng, words), 1)))
        answer = read(exchange)
        if exchange.status in (400, 404, 405, 422, 401, 403):
            text = f"The server refused the first request at {plan.endpoint}: {answer.error}"
            raise EngineError(text, remedy="See --model, --endpoint, --api-key and --no-ignore-eos")
        counted.append(answer.prompt_tokens)
    return scale_of(_PROBE_WORDS, (counted[0], counted[1]))


def arrivals(count: int, rate: float, burstiness: float, rng: random.Random) -> Iterator[float]:
    """When requests come, in seconds from the start: Poisson at burstiness 1, evener above, burstier below."""
    at_s = 0.0
    for _ in range(count):
        yield at_s
        at_s += 0.0 if math.isinf(rate) else rng.gammavariate(burstiness, 1 / (rate * burstiness))


async def _level(
    client: Client,
    plan: Plan,
    requests: Sequence[bytes],
    rate: float,
    concurrency: int | None,
    rng: random.Random,
    on_progress: Progress,
) -> dict[str, Any]:
    due = list(arrivals(len(requests), rate, plan.burstiness, rng))
    name = f"{concurrency} at once" if concurrency else "all at once" if math.isinf(rate) else f"{rate:g}/s"
    gate = asyncio.Semaphore(concurrency or len(requests))
    done: list[Exchange] = []

    async def one(request: bytes) -> None:
        done.append(await client.send(request))
        gate.release()
        on_progress(name, len(done) / len(requests))

    gc.collect()
    gc.disable()  # a collection would look like a pause of the server
    cpu_s, started_s = _cpu_s(), time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for request, due_s in zip(requests, due, strict=True):
                if (wait_s := started_s + due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                await gate.acquire()
                group.create_task(one(request))
    finally:
        gc.enable()
    wall_s = time.perf_counter() - started_s
    cpu_s = _cpu_s() - cpu_s
    head = {
        "max_concurrency": concurrency,
        "request_rate": None if math.isinf(rate) else rate,
        "num_prompts": len(requests),
        "client_cpu_s": round(cpu_s, 3),
    }
    return {**head, **summary([read(exchange) for exchange in done], wall_s, plan.percentiles, plan.goals_ms)}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
