"""What the compiler makes of kernels for Hopper, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pagoda.backend.torch.kernels import decode, prefill

sizes = {"R": 64, "GROUP": 4, "GROUP2": 4, "M": int(sys.argv[2]), "HEAD": 128, "D": 128, "TILE": 64, "SINKS": True}
sizes |= {"CHAINED": True, "CAP": float(sys.argv[5])}
kinds = {"q": "*bf16", "out": "*bf16", "parts": "*fp32", "stats": "*fp32", "sinks": "*fp32", "scale": "fp32"}
kinds |= dict.fromkeys(("k_cache", "v_cache"), "*fp8e4nv")
sizes |= {"FRESH": True, "NORM": True, "LATE": False, "INTERLEAVED": False, "DIM": 128}
kinds |= dict.fromkeys(("q_norm", "k_norm", "cos_sin"), "*fp32") | {"positions": "*i32", "cells": "*i64", "eps": "fp32"}
kinds |= dict.fromkeys(("starts", "contexts", "tables", "runs", "arrived"), "*i32")
kernel = {"_decode": decode, "_prefill": prefill}[sys.argv[1]].__dict__[sys.argv[1]]
signature = {n: "constexpr" if n in sizes else kinds.get(n, "i32") for n in kernel.arg_names}
constants = {(i,): sizes[n] for i, n in enumerate(kernel.arg_names) if n in sizes}
whole = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"}
options = {"num_warps": int(sys.argv[3]), "num_stages": int(sys.argv[4])}
made = triton.compile(ASTSource(kernel, signature, constants, whole), target=GPUTarget("cuda", 90, 32), options=options)
Path(sys.argv[6]).write_bytes(made.asm["cubin"])
tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
print("shared", made.metadata.shared)
print(subprocess.run([tool, sys.argv[6]], capture_output=True, text=True, check=True).stdout)
"""
SHARED_BYTES = 227 << 10


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(("_decode", 16, 4, 3, 0.0), marks=pytest.mark.slow),
        ("_prefill", 128, 8, 2, 72.0),
    ],
)
def test_an_fp8_cache_is_not_read_byte_by_byte(kernel: tuple[str, int, int, int, float], tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SCRIPT, *map(str, kernel), str(tmp_path / "cubin")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "F2FP.F16.E4M3" in done.stdout and "LDS.U8" not in done.stdout
    assert "ACQBULK" in done.stdout  # it waits for the kernel before it
    assert int(done.stdout.split()[1]) <= SHARED_BYTES
