#!/usr/bin/env python3
"""How fast products of one size are with weights of each type, in turns; prints a table, writes JSON.

    python bench/weight_types.py --types MXFP4 IQ4_NL Q4_0 --isa avx512 avx2 --out bench/results/NAME.json

A matrix [outputs, inputs] of random bytes times one row (what a stream of answers does) and times 64 (what a prompt
does). Of each the best of several rounds, in which all types have their turn, counts: the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.library import Native, isas
from pagoda.backend.cpu.records import BufferShape, Dims, Op, Step
from pagoda.weights.ggml import BLOCKS, nbytes

ROWS = (1, 64)


class Product:
    """One matrix in the library, and the program that multiplies it."""

    def __init__(self, isa: str, kind: str, outputs: int, inputs: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        data = rng.integers(0, 256, nbytes(kind, (outputs, inputs)), dtype=np.uint8)
        blocks = data.reshape(-1, BLOCKS[kind].bytes)
        if kind == "MXFP4":
            blocks[:, 0] = 120  # of exponents
        else:
            blocks[:, 1] = 0x20  # of f16 scales
        self.bytes, self.lib, self._freq = data.nbytes, Native(threads, isa), np.ones(8)
        x = rng.standard_normal((max(ROWS), inputs)).astype(np.float32)
        embed = self.lib.weight([(x.view(np.uint8).ravel(), *x.shape, "F32")])
        weight = self.lib.weight([(data, outputs, inputs, kind)])
        dims = Dims(1, 1, 1, 16, max(ROWS), max(ROWS), 16, 64, 16, 0, 1.0, self._freq.ctypes.data)
        self.lib.program(
            dims,
            [BufferShape(inputs, 0), BufferShape(outputs, 0)],
            [
                Op(native.EMBED, -1, 0, embed, -1, -1, 0, 0, 0),
                *[Op(native.MATMUL, 0, 1, weight, -1, -1, 0, 0, 0)] * 8,
            ],
        )

    def seconds(self, rows: int) -> float:
        """Of one product, out of eight in a row."""
        zeros, starts = np.zeros(1, np.int32), np.array([0, rows], np.int32)
        tokens, tables = np.arange(rows, dtype=np.int32), np.arange(64, dtype=np.int32)
        step = Step(requests=1, tokens_count=rows, rows_count=0, table_width=64)
        arrays = {"slots": zeros, "starts": starts, "positions": zeros, "tokens": tokens, "block_tables": tables}
        for name, array in {**arrays, "rows": zeros}.items():
            setattr(step, name, array.ctypes.data)
        start = time.perf_counter()
        if self.lib._lib.pg_start(self.lib._handle, step) < 0:
            raise RuntimeError(self.lib._lib.pg_error(self.lib._handle).decode())
        self.lib._lib.pg_wait(self.lib._handle)
        return (time.perf_counter() - start) / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["MXFP4", "IQ4_NL", "Q4_0"])
    parser.add_argument("--isa", nargs="+", default=isas()[:1])
    parser.add_argument("--shape", nargs=2, type=int, default=[5760, 2880], help="outputs and inputs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    found = []
    for isa in a.isa:
        products = {kind: Product(isa, kind, *a.shape, a.threads) for kind in a.types}
        best = {(kind, rows): float("inf") for kind in a.types for rows in ROWS}
        for _ in range(a.rounds):
            for kind, rows in best:
                best[kind, rows] = min(best[kind, rows], products[kind].seconds(rows))
        for (kind, rows), seconds in best.items():
            gmac_s = a.shape[0] * a.shape[1] * rows / seconds / 1e9
            found.append({"isa": isa, "type": kind, "rows": rows, "us": round(seconds * 1e6, 1), "gmac_s": gmac_s})
            print(f"{isa:>8} {kind:>7} {rows:>3} rows {seconds * 1e6:9.1f} us {gmac_s:8.1f} GMAC/s")
    if a.out:
        a.out.write_text(json.dumps({"shape": a.shape, "threads": a.threads, "products": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
