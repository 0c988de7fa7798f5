"""`pagoda run-batch` as a process, with the real model: every line has its result, in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagoda.cli.main import main

ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_file_of_requests(smollm2_path: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Count: one, two,"}]
    bodies = [("/v1/chat/completions", {"messages": messages, "max_tokens": 4, "temperature": 0})] * 3
    bodies += [("/v1/completions", {"prompt": "One, two, three,", "max_tokens": 4, "temperature": 0})]
    bodies += [("/v1/responses", {"input": "Hi", "max_output_tokens": 4}), ("/v1/completions", {"prompt": ""})]
    lines = [
        json.dumps({"custom_id": f"r{i}", "method": "POST", "url": url, "body": body})
        for i, (url, body) in enumerate(bodies)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([*lines, "{", ""]))
    words = ("run-batch", "-i", str(source), f"--output-file={target}", "--model", smollm2_path, "--threads", "1")
    command = [sys.executable, "-m", "pagoda.cli.main", *words, "--max-model-len", "256", "--max-num-seqs", "2"]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "7 results, 5 of them answers" in done.stderr
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert [each["custom_id"] for each in results] == [*(f"r{i}" for i in range(6)), None]
    assert [each["response"]["status_code"] for each in results[:6]] == [200] * 5 + [400]
    said = [each["response"]["body"]["choices"][0] for each in results[:4]]
    assert said[0]["message"]["content"] == said[1]["message"]["content"] == said[2]["message"]["content"] != ""
    assert "four" in said[3]["text"]
    assert results[6]["response"] is None and "JSON" in results[6]["error"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run-batch", "--help"]) == 0 and "--input-file" in capsys.readouterr().out
    for words, named in (
        (["-o", "x"], "-i FILE"),
        (["-i", "x"], "-o FILE"),
        (["-i"], "-i FILE"),
        (["-i", str(tmp_path / "none"), "-o", "x"], "none can't be used"),
    ):
        assert main(["run-batch", *words]) == 78
        assert named in capsys.readouterr().err
