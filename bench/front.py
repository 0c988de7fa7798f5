#!/usr/bin/env python3
"""The HTTP layer alone: a stub engine process answers at once, so that what the server itself costs is measured.

    python bench/front.py --model smollm2-q4_1.gguf --out bench/results/NAME.json
    python bench/front.py --model smollm2-q4_1.gguf --only 1 --rounds 5 --peer vllm,18700,$PID

The stub speaks the engine's protocol over the real socket and gives every running request one token per step, one
step each --step-ms (0: as fast as it can; a server that is slower than that gets several tokens in one delta). The
server is the real one: routes, checks, chat template, tokenizer, text, events. Only its CPU time counts: tokens,
events and requests per second of one core. The client is bare sockets, in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pagoda.arch.registry import load_spec
from pagoda.engine.messages import EngineStats, ModelInfo
from pagoda.engine.process import main as engine_main
from pagoda.options.config import Options
from pagoda.options.engine_config import EngineConfig
from pagoda.sched.stats import SchedulerStats
from pagoda.types import Delta, Request
from pagoda.weights.open import open_source

HERE = Path(__file__)
PARALLEL = 256
FIRST_TOKEN, TOKENS = 1000, 5000  # ordinary words and pieces of words in the usual vocabularies
Case = tuple[str, float, int, int, int]
TEXT = "The people of the small city by the river have a plan for the year and work on it every day. "


class StubCore:
    """What `EngineCore` is to the engine process, without a model."""

    def __init__(self, config: EngineConfig, progress: Any) -> None:
        source = open_source(config.model)
        spec = load_spec(source)
        self.info = ModelInfo(
            model=config.model, architecture="stub", vocab_size=spec.vocab_size, max_model_len=spec.max_position,
            model_max_len=spec.max_position, num_blocks=1, block_size=16, max_num_seqs=PARALLEL,
            max_num_batched_tokens=512, weight_bytes=0, kv_bytes=0, activation_bytes=0, device="stub",
            weight_types="none", eos_token_ids=(), load_s=0.0,
        )  # fmt: skip
        self._step_s = float(os.environ["STUB_STEP_MS"]) / 1000
        self._left: dict[str, int] = {}
        self._steps = 0
        self._next_at = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def add(self, request: Request) -> None:
        self._left[request.request_id] = request.params.max_tokens or 1

    def cancel(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def begin(self) -> None:
        pass

    def finish(self) -> list[Delta]:
        time.sleep(max(0.0, self._next_at - time.monotonic()))
        self._next_at = max(self._next_at, time.monotonic()) + self._step_s
        self._steps += 1
        deltas = []
        for place, (name, left) in enumerate(list(self._left.items())):
            token = FIRST_TOKEN + (self._steps * 31 + place) % TOKENS
            deltas.append(Delta(request_id=name, token_ids=[token], finish_reason=None if left > 1 else "length"))
            self._left[name] = left - 1
            if left == 1:
                del self._left[name]
        return deltas

    def prepare(self) -> bool:
        return False

    def stats(self) -> EngineStats:
        zeros = dict.fromkeys(
            ("waiting", "blocks_used", "prefix_queries_tokens", "prefix_hits_tokens", "preemptions", "prompt_tokens",
             "generation_tokens"), 0,
        )  # fmt: skip
        return EngineStats(scheduler=SchedulerStats(running=len(self._left), blocks_total=1, **zeros))


def serve(model: str, port: int) -> int:
    """The real server in front of a stub engine."""
    from pagoda.api.http.listen import bind_socket
    from pagoda.api.run import run_server, settle_memory
    from pagoda.cli.serve import make_server
    from pagoda.engine.client import EngineClient

    options = Options(model=model, served_model_name=("m",))
    engine = EngineClient(options.engine_config(model), command=(sys.executable, str(HERE), "engine"))
    engine.spawn()
    with bind_socket("127.0.0.1", port) as listener:
        return run_server(make_server(options, model, engine), engine, listener, drain_s=1.0, on_ready=settle_memory)


class Client(asyncio.Protocol):
    """One connection; sends one request at a time, and counts the events of the answer."""

    def __init__(self, stream: bool) -> None:
        self._end = b"\r\n0\r\n\r\n" if stream else b"}"  # the last chunk
        self.events = self.bytes = 0
        self._tail = b""
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: ") + data.count(b"}\n\r\n")  # events, or lines of JSON
        self.bytes += len(data)
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(self._end) and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes) -> None:
        self._tail, self._done = b"", asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def asked(route: str, output: int) -> tuple[str, dict[str, Any]]:
    """The path of a route, and what it calls the text and the limit."""
    messages = {"messages": [{"role": "user", "content": TEXT}]}
    limit = {"max_tokens": output}
    return {
        "completions": ("/v1/completions", {"prompt": TEXT, **limit}),
        "chat": ("/v1/chat/completions", {**messages, **limit}),
        "messages": ("/v1/messages", {**messages, **limit}),
        "responses": ("/v1/responses", {"input": TEXT, "max_output_tokens": output}),
        "ollama": ("/api/chat", {**messages, "options": {"num_predict": output}}),
    }[route]


async def load(port: int, kind: str, streams: int, rounds: int, output: int) -> dict[str, Any]:
    """Each stream sends `rounds` requests, one after the other, over one connection."""
    stream = kind.endswith("stream")
    path, body = asked(kind.partition("-")[0], output)
    data = request(path, {"model": "m", "stream": stream, "ignore_eos": True, **body})
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(lambda: Client(stream), "127.0.0.1", port))[1] for _ in range(streams)]

    async def one(client: Client) -> None:
        for _ in range(rounds):
            await client.ask(data)

    started = time.perf_counter()
    await asyncio.gather(*(one(client) for client in clients))
    wall_s = time.perf_counter() - started
    for client in clients:
        client._transport.close()
    return {"wall_s": wall_s, "requests": streams * rounds, "events": sum(client.events for client in clients)}


def cpu_s(pid: int) -> float:
    """Processor time of all threads; finer than ticks."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def serving(a: argparse.Namespace, step_ms: float, port: int, source: str = "") -> Iterator[int]:
    """A warm server in front of a stub engine, by the code of `source`; the id of its process."""
    environment = {**os.environ, "STUB_STEP_MS": str(step_ms)}
    if source:
        environment["PYTHONPATH"] = str(Path(source) / "src")
    command = [sys.executable, str(HERE), "serve", a.model, str(port)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        asyncio.run(until_open(port))
        for kind in ("chat-stream", "completions-stream"):
            asyncio.run(load(port, kind, 8, 2, 16))
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def measure(pid: int, port: int, case: Case) -> dict[str, Any]:
    kind, step_ms, streams, rounds, output = case
    before, own = cpu_s(pid), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    seen = asyncio.run(load(port, kind, streams, rounds, output))
    server_s = cpu_s(pid) - before
    tokens = seen["requests"] * output
    return {
        "kind": kind, "step_ms": step_ms, "streams": streams, "output": output, **seen, "server_cpu_s": server_s,
        "client_user_s": resource.getrusage(resource.RUSAGE_SELF).ru_utime - own,
        "us_per_token": round(1e6 * server_s / tokens, 1),
        "tokens_per_core_s": round(tokens / server_s), "events_per_core_s": round(seen["events"] / server_s),
        "requests_per_core_s": round(seen["requests"] / server_s, 1),
        "tokens_per_wall_s": round(tokens / seen["wall_s"]),
    }  # fmt: skip


def in_turns(a: argparse.Namespace, case: Case) -> dict[str, list[dict[str, Any]]]:
    """One case, by this code, by that of --before, and by the running servers of --peer, one after the other."""
    sources = {"before": a.before, "now": ""} if a.before else {"now": ""}
    with ExitStack() as stack:
        servers = {
            name: (stack.enter_context(serving(a, case[1], a.port + place, source)), a.port + place)
            for place, (name, source) in enumerate(sources.items())
        }
        for peer in a.peer:
            name, port, pid = peer.split(",")
            servers[name] = int(pid), int(port)
            asyncio.run(load(int(port), case[0], 8, 2, 16))
        rounds = [{name: measure(*server, case) for name, server in servers.items()} for _ in range(a.rounds)]
    return {name: [each[name] for each in rounds] for name in servers}


async def until_open(port: int) -> None:
    for _ in range(200):
        try:
            (await asyncio.open_connection("127.0.0.1", port))[1].close()
            return
        except OSError:
            await asyncio.sleep(0.05)
    sys.exit("the server did not start")


def commit() -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=HERE.parent).strip()


CASES: tuple[Case, ...] = (
    # kind, step_ms, streams, rounds, output
    ("completions-stream", 10.0, 32, 1, 500),
    ("chat-stream", 10.0, 32, 1, 500),
    ("chat-stream", 0.0, 32, 4, 512),
    ("completions", 0.0, 16, 40, 1),
    ("chat", 0.0, 16, 40, 1),
    ("chat", 0.0, 32, 8, 512),
    ("messages-stream", 10.0, 32, 1, 500),
    ("responses-stream", 10.0, 32, 1, 500),
    ("ollama-stream", 10.0, 32, 1, 500),
)
"""One token per event at a pace that the server can hold; then as fast as it can; then requests not streamed; then
the other dialects at that pace.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=18400)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to run")
    parser.add_argument("--step-ms", type=float, help="in place of the cases' own: the pace of a peer's engine")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--before", default="", help="a work tree of other code, to measure in turns with this one")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME,PORT,PID",
        help="a running server with a model named m, whose engine is a process of its own",
    )  # fmt: skip
    a = parser.parse_args()
    cases = [case for i, case in enumerate(CASES) if a.only is None or i in a.only]
    if a.step_ms is not None:
        cases = [(kind, a.step_ms, *rest) for kind, _, *rest in cases]
    results = [in_turns(a, case) for case in cases]
    for result in results:
        for name, rounds in result.items():
            print(line(name, sorted(rounds, key=lambda each: float(each["us_per_token"]))[len(rounds) // 2]))
    if a.out is not None:
        a.out.write_text(
            json.dumps({"machine": platform.machine(), "commit": commit(), "cases": results}, indent=1) + "\n"
        )


def line(name: str, case: dict[str, Any]) -> str:
    return (
        f"{name:8} {case['kind']:18} step {case['step_ms']:4.0f} ms {case['streams']:3} streams x {case['output']:3}: "
        f"{case['us_per_token']:7} us a token; "
        f"{case['tokens_per_core_s']:7} tok, {case['events_per_core_s']:6} events, "
        f"{case['requests_per_core_s']:7.1f} req per core s; {case['tokens_per_wall_s']:6} tok/s"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        sys.exit(engine_main(sys.argv[1:], StubCore))  # type: ignore[arg-type]
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(sys.argv[2], int(sys.argv[3])))
    main()
