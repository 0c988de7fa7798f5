"""The GPU benchmark runs from end to end: on a CPU with tiny shapes, in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pagoda.backend.torch.kernels.tuning import Tile

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.py"


@pytest.mark.slow
def test_every_phase_of_the_gpu_benchmark(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    phases = {row["phase"] for row in rows}
    assert phases >= {
        "machine", "roof", "correctness", "kernel", "start", "decode", "prefill", "profile", "throughput", "tile"
    }  # fmt: skip
    assert all(row["ok"] for row in rows if row["phase"] == "correctness")
    assert all(row["finished"] for row in rows if row["phase"] == "throughput")
    tiles = json.loads((tmp_path / "tuned.json").read_text())
    assert "decode" in tiles and all(Tile(**tile) for tile in tiles.values())
    assert "tiny" in (tmp_path / "table.txt").read_text()
