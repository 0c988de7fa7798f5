"""Without a GPU: what a step launches there, and that each of these kernels compiles and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
MOST = {
    "Qwen3-0.6B": {1: 148, 8: 232},
    "Qwen3-8B-FP8": {1: 188, 8: 296, 64: 332},
    "Qwen3-32B-AWQ": {1: 456, 64: 456},
    "Qwen3-30B-A3B": {1: 440, 64: 488},
}
"""Launches of a greedy decode step."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


def test_a_step_launches_no_more_than_it_did() -> None:
    command = [sys.executable, str(BENCH / "gpu_launches.py"), "--json", "--models", ",".join(MOST)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    found = {name: {row["batch"]: row["step"] for row in rows if row["model"] == name} for name in MOST}
    assert all(found[name][batch] <= most for name, batches in MOST.items() for batch, most in batches.items()), found


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [86, 90])
def test_kernels_compile_and_fit(gpu: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(BENCH / "gpu_compile.py"), "--quick", "--jobs", "1", "--gpus", str(gpu)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert all(f"`{name}`" in done.stdout for name in ("_rope", "_decode", "_prefill", "_gemv", "_w4", "_product"))


@pytest.mark.slow
def test_what_the_machine_code_of_large_kernels_does(tmp_path: Path) -> None:
    """Nothing spills, weights and keys are read by 16 bytes, products of many rows are done by the matrix units."""
    kernels, out = "_gemv,_decode,_product,_w4", tmp_path / "facts"
    command = [sys.executable, str(BENCH / "gpu_compile.py"), "--gpus", "90", "--jobs", "1", "--only", kernels]
    command += ["--models", "Qwen3-8B-FP8,Qwen3-32B-AWQ", "--batches", "1,64", "--out", str(out)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["kernel"] for row in rows} == set(kernels.split(","))
    for row in rows:
        about = row["kernel"], row["of"], row["tile"]
        assert row["local"] == 0 and row["stack"] == 0, about
        assert row["loads"]["16"] >= 2, about
        assert (row["kernel"] == "_gemv") != bool(row["matrix"]), about
        assert row["programs"] * 32 * row["warps"] >= 256 and row["programs"] >= 2, about
        assert (row["kernel"] == "_gemv") or row["ahead"] > 0, about


def test_what_requests_need_is_compiled_before_they_come() -> None:
    """A compilation takes seconds, in which all streams stand still."""
    command = [sys.executable, str(BENCH / "gpu_compile.py"), "--gpus", "90", "--steps", "40"]
    command += ["--models", "Qwen3-8B-FP8,Qwen3-30B-A3B"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["model"] for row in rows] == ["Qwen3-8B-FP8", "Qwen3-30B-A3B"]
    assert all(not row["late"] and row["ready"] <= 34 and row["idle"] <= 8 for row in rows), rows
