"""`pagoda bench latency` and `throughput`: a model in this process, under vLLM's names and in its shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import engine_tiny
import pytest

from pagoda.cli.main import main

OWN = ("--device", "reference", "--num-gpu-blocks-override", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return engine_tiny.write(tmp_path_factory.mktemp("tiny"))


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?", text)]


def test_latency(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "latency.json"
    words = ["--input-len", "5", "--output-len=3", "--batch_size", "2", "--num-iters", "4", "--num-iters-warmup", "1"]
    for more in ([], ["--use-beam-search", "--n", "2"]):
        assert main(["bench", "latency", "--model", model, *words, *more, *OWN, "--output-json", str(target)]) == 0
        table = json.loads(target.read_text())
        assert list(table) == ["model_id", "avg_latency", "latencies", "percentiles"] and table["model_id"] == model
        took = sorted(table["latencies"])
        assert len(took) == 4 and took[0] <= table["avg_latency"] <= took[-1] and took[0] > 0
        assert list(table["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
        assert table["percentiles"]["50"] == pytest.approx((took[1] + took[2]) / 2)
        first, *rest = capsys.readouterr().out.splitlines()
        assert first == f"Avg latency: {table['avg_latency']} seconds" and len(rest) == 6
        assert rest[2] == f"50% percentile latency: {table['percentiles']['50']} seconds"


def test_throughput(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "throughput.json"
    words = [
        "--model",
        model,
        "--num-prompts",
        "6",
        "--random-input-len",
        "7",
        "--output-len",
        "4",
        "--prefix-len",
        "9",
    ]
    words += ["--n", "2", "--num-warmups", "1", "--disable-detokenize", "--output-json", str(target)]
    assert main(["bench", "throughput", *words, *OWN]) == 0
    table = json.loads(target.read_text())
    tokens_in, tokens_out = 6 * (9 + 7), 6 * 2 * 4
    assert table["num_requests"] == 6 and table["total_num_tokens"] == tokens_in + tokens_out
    assert table["requests_per_second"] == pytest.approx(6 / table["elapsed_time"])
    assert table["tokens_per_second"] == pytest.approx((tokens_in + tokens_out) / table["elapsed_time"])
    out, err = capsys.readouterr()
    rates, of_prompts, of_answers = out.splitlines()
    assert numbers(rates)[0] == pytest.approx(table["requests_per_second"], abs=0.01)
    assert numbers(rates)[2] == pytest.approx(tokens_out / table["elapsed_time"], abs=0.01)
    assert numbers(of_prompts) == [tokens_in] and numbers(of_answers) == [tokens_out]
    assert "--disable-detokenize" in err


def test_a_file_and_an_adapter(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "One"}\n{"messages": [{"role": "user", "content": "Two"}], "output_tokens": 2}\n')
    adapter = tmp_path / "adapter"
    engine_tiny.write_adapter(adapter)
    words = ["--model", model, "--dataset-path", str(rows), "--output-len", "5", *OWN]
    found = []
    for more in ([], ["--backend", "vllm-chat"], ["--num-prompts", "3", "--lora-path", str(adapter)]):
        assert main(["bench", "throughput", *words, *more]) == 0
        found.append([numbers(line)[0] for line in capsys.readouterr().out.splitlines()[1:]])
    templated = [f"user: {text}\nassistant:" for text in ("One", "Two")]
    assert found == [[6, 7], [sum(map(len, templated)), 7], [9, 12]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["latency", "--input-len", "200", "--output-len", "100"], "--max-model-len 300"),
        (["throughput", "--input-len", "200", "--output-len", "100"], "--max-model-len 300"),
        (["throughput", "--backend", "hf"], "vllm-chat"),
        (["throughput", "--backend", "vllm-chat"], "--dataset-path"),
        (["throughput", "--dataset-name", "sharegpt"], "--dataset-path"),
        (["latency", "--batch-size", "0"], "1 or more"),
        (["latency", "--num-iters"], "needs a value"),
        (["latency", "--concurrency", "3"], "--concurrency"),
        (["latency", "--output-json", "/nowhere/x", "--num-iters", "1", "--output-len", "1"], "/nowhere/x"),
    ],
)
def test_what_cannot_be_done_says_so(
    model: str, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["bench", words[0], "--model", model, *OWN, *words[1:]]) == 78
    assert said in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("latency", "throughput"):
        assert main(["bench", kind, "--help"]) == 0
        assert f"vllm bench {kind}" in capsys.readouterr().out
