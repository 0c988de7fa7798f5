"""The GPU benchmark runs from end to end: on a CPU with tiny shapes, in Triton's interpreter."""

from __future__ import annotations

import json
import os
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


@pytest.mark.parametrize("seconds", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_the_run_ends_when_its_time_is_up(seconds: int, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    # a unit that is under way then has ten seconds more
    assert all(row["at_s"] < seconds + 12 for row in rows)
    checked = sum(row["phase"] == "correctness" for row in rows)
    assert f"kernels: {checked} cases" in (tmp_path / "table.txt").read_text()
    assert done.returncode in (0, 1)
    assert not (tmp_path / "scratch").exists()


FAULTS = """
import os, sys, time
if any(word.endswith("gpu_work.py") for word in sys.orig_argv):
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from pagoda.backend.torch.kernels import matmul, norm
    from pagoda.backend.torch.load import Loader
    from pagoda.backend.torch.packs import W8

    def raises(*args):
        raise RuntimeError("no such instruction")

    def wrong(*args, own=norm.quantize_f8):
        codes, scales = own(*args)
        return codes.float() + 100, scales

    def hangs(x, *rest, own=matmul.grouped, **more):
        if len(x) == 30:
            time.sleep(1000)
        return own(x, *rest, **more)

    def dies(x, weight, own=matmul.matmul):
        if isinstance(weight, W8) and len(x) == 17:
            os._exit(9)
        return own(x, weight)

    def loads(self, *args, own=Loader.decoder):
        if self._spec.layers[0].mlp.experts is None:
            raise ValueError("no such layer")
        return own(self, *args)

    class Hangs:
        def __init__(self, **kinds):
            time.sleep(1000)

    norm.quantize_rows, norm.quantize_f8, matmul.grouped, matmul.matmul = raises, wrong, hangs, dies
    Loader.decoder, torch.profiler.profile = loads, Hangs
"""
"""What Python runs first of all in the process that measures: kernels and models that fail in each way there is."""


@pytest.mark.slow
def test_what_fails_or_hangs_is_a_line_of_the_table_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    phases = ["--phases", "correctness,models,autotune", "--unit-limit", "15"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path), *phases],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    checked = {row["kernel"]: row for row in rows if row["phase"] == "correctness"}
    assert len(checked) > 35 and sum(row["phase"] == "correctness" for row in rows) == len(checked)
    bad = {name: str(row["error"]) for name, row in checked.items() if not row["ok"]}
    assert "no such instruction" in bad["quantize_rows"] and float(bad["quantize_f8"]) > 0.15
    assert "hung" in bad["grouped dense 30"] and "code 9" in bad["matmul w8 17"]
    assert not any(name.startswith(("attention", "matmul dense", "matmul w4", "norm_matmul")) for name in bad)
    failed = {row["what"]: row["error"] for row in rows if row["phase"] == "failed"}
    assert failed.keys() == {"tiny: load", "tiny-experts: profile 1"}
    assert "no such layer" in failed["tiny: load"] and "hung" in failed["tiny-experts: profile 1"]
    assert {row["model"] for row in rows if row["phase"] in ("decode", "prefill")} == {"tiny-experts"}
    assert "decode" in json.loads((tmp_path / "tuned.json").read_text())
    table = (tmp_path / "table.txt").read_text()
    assert all(name in table for name in ("WRONG grouped dense 30", "FAILED tiny: load", "tiny-experts   decode"))
    assert not (tmp_path / "scratch").exists()


@pytest.mark.slow
def test_every_phase_of_the_gpu_benchmark(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    phases = {row["phase"] for row in rows}
    assert phases >= {
        "machine", "roof", "correctness", "kernel", "first", "decode", "prefill", "profile", "throughput", "start",
        "tile", "time",
    }  # fmt: skip
    assert all(row["ok"] for row in rows if row["phase"] == "correctness")
    assert all(row["finished"] for row in rows if row["phase"] == "throughput")
    tiles = json.loads((tmp_path / "tuned.json").read_text())
    assert "decode" in tiles and all(Tile(**tile) for tile in tiles.values())
    assert all(row["seconds"] < row["limit_s"] + 60 for row in rows if row["phase"] == "time")
    assert {row["model"] for row in rows if row["phase"] == "decode"} == {
        "tiny", "tiny-experts", "tiny-experts x2"
    }  # fmt: skip
    assert [row["cache"] for row in rows if row["phase"] == "start"] == ["cold", "warm"]
    assert "tiny" in (tmp_path / "table.txt").read_text()
