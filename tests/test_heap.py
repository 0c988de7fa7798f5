"""What a process gives back once it has loaded."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig

FREED = """
from pathlib import Path
from pagoda import heap

def resident_kib():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

pieces = [bytes(2000) for _ in range(20_000)]
last = bytes(2000)  # above the others, so the heap cannot shrink by itself
full = resident_kib()
del pieces
freed = resident_kib()
heap.settle()
print(full, freed, resident_kib(), len(last))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_what_is_free_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    full, freed, settled, _ = map(int, done.stdout.split())
    assert full - freed < 10_000 and full - settled > 30_000


def test_an_engine_does_not_keep_the_vocabulary(smollm2_path: Path) -> None:
    def large_lists() -> int:
        return sum(isinstance(one, list) and len(one) > 40_000 for one in gc.get_objects())

    before = large_lists()
    core = EngineCore(EngineConfig(model=str(smollm2_path), max_model_len=64, num_blocks=8))
    assert large_lists() == before
    assert len(core.metadata["tokenizer.ggml.tokens"]) == 49152
    core.close()


def test_loading_leaves_little_to_collect(smollm2_path: Path) -> None:
    """What is garbage when a process settles stays for its life; it took 26,000 objects to open 211 libraries."""
    gc.collect()
    gc.disable()
    try:
        core = EngineCore(EngineConfig(model=str(smollm2_path), max_model_len=64, num_blocks=8))
        left = gc.collect()
    finally:
        gc.enable()
    core.close()
    assert left < 3000
