"""`pagoda bench` against a server on a port: what it sends, when, and what it makes of the answers."""

from __future__ import annotations

import itertools
import json
import math
import random
import socket
import statistics
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_fake import FakeEngine, make_server, on_port

from pagoda.bench.http import Exchange
from pagoda.bench.load import arrivals
from pagoda.bench.prompts import Scale, scale_of
from pagoda.bench.result import percentile, read, summary
from pagoda.cli.main import main

DELAY_S = 0.01


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine(delay_s=DELAY_S)
    with on_port(make_server(engine), engine) as base:
        yield base, engine


@pytest.fixture
def base(served: tuple[str, FakeEngine]) -> str:
    served[1].requests.clear()
    return served[0]


def bench(base: str, tmp_path: Path, *words: str) -> dict:  # type: ignore[type-arg]
    target = tmp_path / "result.json"
    assert main(["bench", "--base-url", base, "--json", str(target), *words]) == 0
    report: dict = json.loads(target.read_text())  # type: ignore[type-arg]
    return report


def prompts(engine: FakeEngine) -> list[str]:
    return [bytes(r.prompt_token_ids).decode() for r in engine.requests]


def test_a_sweep(base: str, served: tuple[str, FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    words = ("--concurrency", "1,4", "--num-prompts", "8", "--input-len", "100", "--output-len", "10")
    report = bench(base, tmp_path, *words, "--plot", str(plot), "--goodput", "ttft:5000", "tpot:5000")
    assert report["model"] == "fake-model" and [r["max_concurrency"] for r in report["runs"]] == [1, 4]
    alone, four = report["runs"]
    for run in (alone, four):
        assert (run["completed"], run["failed"], run["total_output_tokens"]) == (8, 0, 80)
        # The fake counts bytes; what is asked for is in the server's own tokens.
        assert 85 <= run["total_input_tokens"] / 8 <= 115
        assert run["p50_ttft_ms"] >= DELAY_S * 1000 * 0.9 and run["p50_itl_ms"] >= DELAY_S * 1000 * 0.5
        assert run["p50_e2el_ms"] >= 9 * DELAY_S * 1000
        assert run["p50_ttft_ms"] <= run["p90_ttft_ms"] <= run["p99_ttft_ms"] <= run["p99_e2el_ms"]
        assert run["request_goodput"] == run["request_throughput"]
        assert run["output_throughput"] == pytest.approx(80 / run["duration"], rel=0.01)
        assert run["client_cpu_s"] < run["duration"]
    assert four["request_throughput"] > 2 * alone["request_throughput"]
    asked = served[1].requests[3:]
    assert len(asked) == 16 and all(r.params.ignore_eos and r.params.max_tokens == 10 for r in asked)
    assert len({text[:12] for text in prompts(served[1])}) == 19, "they begin differently"
    assert len(ElementTree.fromstring(plot.read_text()).findall(".//{*}polyline")) == 11
    table = capsys.readouterr().out
    assert "TTFT ms p50" in table and "good/s" in table


def test_shared_beginnings_chat_and_vllms_names(base: str, served: tuple[str, FakeEngine], tmp_path: Path) -> None:
    report = bench(
        base, tmp_path, "serve", "--backend", "openai-chat", "--random-prefix-len", "60", "--random-input-len", "60",
        "--random-output-len", "4", "--random-range-ratio", "0.2", "--max-concurrency", "3", "--num-prompts", "6",
        "--num-warmups", "0", "--seed", "1", "--save-result", "--metric-percentiles", "50,99",
    )  # fmt: skip
    run = report["runs"][0]
    assert run["completed"] == 6 and "p90_ttft_ms" not in run and run["cached_tokens"] == 24
    assert 100 <= run["total_input_tokens"] / 6 <= 145
    texts = [bytes(r.prompt_token_ids[1:]).decode() for r in served[1].requests[2:]]
    assert all(text.startswith("user: ") for text in texts)
    assert len({text[6:55] for text in texts}) == 1 and len({text[:90] for text in texts}) == 6
    again = bench(base, tmp_path, "--input-len", "60", "--num-prompts", "2", "--concurrency", "1", "--seed", "1")
    assert again["seed"] == 1


def test_requests_come_at_their_rate(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--request-rate", "50", "--num-prompts", "40", "--output-len", "2", "--input-len", "20", "--seed", "3")
    run = bench(base, tmp_path, *words)["runs"][0]
    assert "rate  req/s" in capsys.readouterr().out and run["failed"] == 0
    assert run["max_concurrency"] is None and run["request_rate"] == 50
    wanted = list(arrivals(40, 50, 1.0, random.Random(0)))
    assert 0.3 * wanted[-1] < run["duration"] < 3 * wanted[-1] + 1


def test_arrivals_are_poisson() -> None:
    for burstiness in (1.0, 4.0):
        times = list(arrivals(5000, 20, burstiness, random.Random(7)))
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.05)
        assert statistics.stdev(gaps) * 20 == pytest.approx(burstiness**-0.5, rel=0.08)
    assert set(arrivals(5, math.inf, 1.0, random.Random(0))) == {0.0}


def test_prompts_of_a_file(base: str, served: tuple[str, FakeEngine], tmp_path: Path) -> None:
    rows = {
        "a.jsonl": '{"prompt": "One"}\n{"prompt": "Two", "output_tokens": 3}\n{"messages": [{"content": "Three"}]}\n',
        "b.json": '[{"conversations": [{"from": "human", "value": "One"}, {}]}, "Two", {"prompt": "Three"}]',
        "c.txt": "One\n\nTwo\nThree\n",
    }
    for name, text in rows.items():
        path = tmp_path / name
        path.write_text(text)
        served[1].requests.clear()
        words = ("--dataset-path", str(path), "--output-len", "5", "--concurrency", "1", "--num-warmups", "0")
        run = bench(base, tmp_path, *words)["runs"][0]
        assert prompts(served[1]) == ["One", "Two", "Three"] and run["completed"] == 3
        assert [r.params.max_tokens for r in served[1].requests] == [5, 3 if name == "a.jsonl" else 5, 5]
        assert not served[1].requests[0].params.ignore_eos


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model", "other"], 70, "other"),
        (["--base-url", "http://127.0.0.1:9"], 70, "pagoda serve"),
        (["--base-url", "localhost:8000"], 78, "http://localhost:8000"),
        (["--concurrency", "1,x"], 78, "--concurrency 1,4,16"),
        (["--output-len", "0"], 78, "1 or more"),
        (["--goodput", "itl:5"], 78, "ttft:500"),
        (["--dataset-name", "sonnet"], 78, "prefix_repetition"),
        (["--dataset-path", "/nowhere"], 78, "--dataset-path"),
        (["--backend", "tgi"], 78, "openai-chat"),
        (["--extra-body", "[]"], 78, "--extra-body"),
        (["--lora-modules", "x"], 78, "--lora-modules"),
        (["startup"], 78, "startup"),
        (["sweep"], 78, "--concurrency 1,4,16"),
    ],
)
def test_what_cannot_be_done_says_so(
    base: str, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert main(["bench", "--base-url", base, *words]) == code
    assert said in capsys.readouterr().err


def test_failed_requests_are_counted_and_told(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--base-url", base, "--input-len", "900", "--num-prompts", "2", "--concurrency", "2"]) == 1
    out = capsys.readouterr().out
    assert "failed: HTTP 400" in out and "512" in out


def recorded(*pieces: bytes, status: int = 200) -> Exchange:
    return Exchange(0.0, 9.0, status, [(float(i + 1), piece) for i, piece in enumerate(pieces)])


def test_events_are_read_wherever_they_are_cut() -> None:
    stream = (
        b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n: keep-alive\n\n'
        b'data: {"choices":[{"delta":{"reasoning":"a","reasoning_content":"a"}}]}\n\n'
        b'data: {"choices":[{"delta":{"content":"b"}}]}\n\n'
        b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,'
        b'"prompt_tokens_details":{"cached_tokens":2}}}\n\ndata: [DONE]\n\n'
    )
    for cut in range(1, len(stream)):
        answer = read(recorded(stream[:cut], stream[cut:]))
        assert not answer.error and len(answer.times_s) == 2, stream[:cut]
        assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (5, 3, 2)
    whole = read(recorded(b"", stream))
    assert whole.metric("ttft") == 2.0 and whole.metric("e2el") == 2.0 and whole.metric("tpot") == 0.0


@pytest.mark.parametrize(
    ("exchange", "said"),
    [
        (recorded(b'{"error":{"message":"no such model"}}', status=404), "HTTP 404: no such model"),
        (recorded(b'data: {"error":{"message":"out of luck"}}\n\n'), "out of luck"),
        (recorded(b'data: {"choices":[{"text":"a"}]}\n\n'), "broke off"),
        (recorded(b"data: {nonsense\n\n"), "cannot be read"),
        (Exchange(error="no answer within 5 s"), "no answer within 5 s"),
    ],
)
def test_broken_answers_are_failures(exchange: Exchange, said: str) -> None:
    answer = read(exchange)
    assert said in answer.error
    numbers = summary([answer], 1.0, (50,), {"ttft": 1.0})
    assert (numbers["failed"], numbers["completed"], numbers["request_goodput"]) == (1, 0, 0)
    assert numbers["errors"] == [answer.error]


def test_numbers() -> None:
    assert [percentile([1.0, 2.0, 3.0, 5.0], share) for share in (0, 50, 100)] == [1.0, 2.5, 5.0]
    assert percentile([4.0], 99) == 4.0
    assert scale_of((16, 64), (28, 124)) == Scale(-4, 2) and scale_of((16, 64), (0, 0)) == Scale()
    assert Scale(10, 2).words(110) == 50 and Scale(10, 2).words(110, whole=False) == 55


def test_a_connection_that_dies_fails_one_request_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A server of our own: loads, answers the model list, two probes and a warm-up, breaks one stream, goes on."""
    event = b'data: {"choices":[{"text":"a","finish_reason":"length"}]}\n\n'
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen: list[str] = []

        def serve() -> None:
            for _ in range(9):
                connection, _ = listener.accept()
                with connection:
                    request = connection.recv(65536)
                    while request.split(b"\r\n\r\n", 1)[1] == b"" and request.startswith(b"POST"):
                        request += connection.recv(65536)
                    seen.append(request.split(b" ", 2)[1].decode())
                    body = b'{"data":[{"id":"m"}]}' if len(seen) == 2 else event
                    status = b"503 Busy" if len(seen) == 1 else b"200 OK"
                    if len(seen) != 7:
                        connection.sendall(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\n\r\n" + body)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        words = ["--num-prompts", "4", "--concurrency", "1", "--output-len", "1", "--ready-check-timeout-sec", "20"]
        assert main(["bench", "--base-url", url + "/v1/", *words]) == 1
        thread.join(60)
    assert seen == [*["/v1/models"] * 2, *["/v1/completions"] * 7]
    assert "failed: the connection broke" in capsys.readouterr().out


def test_the_key_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    with on_port(make_server(engine, api_keys=("secret",)), engine) as base:
        words = ("--output-len", "2", "--num-prompts", "2", "--concurrency", "1", "--input-len", "9")
        assert main(["bench", "--base-url", base, *words]) == 70
        assert "--api-key" in capsys.readouterr().err
        assert bench(base, tmp_path, *words, "--api-key", "secret")["runs"][0]["completed"] == 2
