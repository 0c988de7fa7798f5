"""Tile sizes of the kernels: defaults, and the best ones a measurement found, from `tuned.json` beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth of a tile, how many programs share the depth, warps, stages of the loads."""

    m: int = 64
    n: int = 64
    k: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3


DEFAULTS = MappingProxyType(
    {
        "prefill": Tile(m=128, n=128, warps=8, stages=2),
        "decode": Tile(n=32, warps=4, stages=7),
    }
)
"""By the name of the kernel."""


def bucket(rows: int) -> int:
    """Rows of a product, rounded up to a power of two: what a measurement is made for."""
    return 1 << (rows - 1).bit_length()


@cache
def measured(kernel: str, *shape: int) -> Tile | None:
    """The best tile of a kernel for a shape (matrices: outputs, inputs, bucket of rows), where one was measured."""
    return _tuned().get("/".join((kernel, *(str(n) for n in shape))))


def choose(kernel: str) -> Tile:
    """The tile of a kernel that has one for all shapes."""
    return measured(kernel) or DEFAULTS[kernel]


@cache
def _tuned() -> dict[str, Tile]:
    """The measured tiles, keys such as "w4/4096/12288/16"."""
    path = Path(__file__).with_name("tuned.json")
    return {key: Tile(**tile) for key, tile in json.loads(path.read_text()).items()} if path.exists() else {}
