"""The AMX products, their tile instructions in plain arithmetic, against the AVX-512 table, bit for bit."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from pagoda.backend.cpu import library

NATIVE = Path(__file__).parents[1] / "native"
FLAGS = (
    "-std=c++17 -O1 -ffp-contract=off -Wno-psabi -mavx2 -mfma -mf16c "
    "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86")
def test_products_in_tiles_have_the_bits_of_avx512(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None or "avx512" not in library.isas():
        pytest.skip("this needs a C++ compiler, and AVX-512 with VNNI to compare with")
    here = Path(library.__file__).parent
    program = tmp_path / "amx_test"
    sources = [f"-I{NATIVE / 'src'}", str(NATIVE / "tests/amx_test.cpp")]
    against = [str(here / "libpagoda_cpu.so"), f"-Wl,-rpath,{here}"]
    subprocess.run([compiler, *FLAGS.split(), *sources, *against, "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "emulated amx: 18 types checked" in done.stdout
