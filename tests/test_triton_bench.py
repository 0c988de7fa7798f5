"""The GPU benchmark runs from end to end: on a CPU with tiny shapes, in Triton's interpreter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagoda.backend.torch.kernels.tuning import Tile

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.py"


@pytest.mark.parametrize(("phase", "count"), [("machine", 1), ("correctness", 3)])
def test_what_was_measured_outlives_the_end_of_the_run(phase: str, count: int, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    file, deadline = tmp_path / "results.jsonl", time.monotonic() + 300
    while not file.exists() or file.read_text().count(f'"phase": "{phase}"') < count:
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.05)
    running.terminate()
    running.communicate(timeout=300)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(row["phase"] == phase for row in rows) >= count and not any(row["phase"] == "decode" for row in rows)
    if running.returncode != -signal.SIGTERM:  # it had begun to measure, and ends with its table
        assert running.returncode == 128 + signal.SIGTERM
        assert "kernels: " in (tmp_path / "table.txt").read_text()


@pytest.mark.slow
def test_every_phase_of_the_gpu_benchmark(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    phases = {row["phase"] for row in rows}
    assert phases >= {
        "machine", "roof", "correctness", "kernel", "start", "decode", "prefill", "profile", "throughput", "tile",
        "time",
    }  # fmt: skip
    assert all(row["ok"] for row in rows if row["phase"] == "correctness")
    assert all(row["finished"] for row in rows if row["phase"] == "throughput")
    tiles = json.loads((tmp_path / "tuned.json").read_text())
    assert "decode" in tiles and all(Tile(**tile) for tile in tiles.values())
    assert all(row["seconds"] < row["limit_s"] + 60 for row in rows if row["phase"] == "time")
    assert {row["model"] for row in rows if row["phase"] == "decode"} == {"tiny", "tiny-experts"}
    assert "tiny" in (tmp_path / "table.txt").read_text()
