#!/usr/bin/env python3
"""The CUDA backend on the GPUs of a machine, in one run of at most 8 minutes: right or wrong, how near to the roof.

    python bench/gpu.py --out bench/results/gpu-NAME            # a GPU
    python bench/gpu.py --out DIR --quick                       # tiny shapes; without a GPU in Triton's interpreter

Needs the package, PyTorch and Triton; no network and no checkpoint: weights are random, of the public shapes. First
kernels that start ahead of the end of the one before against the same ones without (where that fails the rest goes on
without), then every kernel against plain PyTorch, then the kernels alone, whole models in the engine's own loop
(decode at several batch sizes, prefill, offline throughput, top kernels of a profile), on several GPUs too where there
are several, the time from the start to the first token, and last a search for better tiles. A process of its own does
the work: a unit that raises, breaks the GPU or hangs is one line of the table, and the rest goes on. Every line is
written to DIR/results.jsonl as it comes; tiles go to DIR/tuned.json, which src/pagoda/backend/torch/kernels/ takes
as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
WORKER = Path(__file__).with_name("gpu_work.py")
PHASES_S = {"ahead": 20, "correctness": 80, "kernels": 50, "models": 190, "parallel": 60, "start": 80, "autotune": 60}
TOTAL_S = 455
UNITS_S = {
    "begin": 90,
    "ahead": 30,
    "correctness": 30,
    "kernel": 30,
    "load": 90,
    "measure": 60,
    "start": 90,
    "tile": 60,
}
"""Longer than this nothing may take that goes well; `begin`: until the first unit."""
SLOWER_WITHOUT_GPU = 4
END_S = 10

Row = dict[str, Any]


class Report:
    """Lines to the file as they come, kept for the table."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, []
        self._file = os.open(folder / "results.jsonl", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        os.write(self._file, (json.dumps(row) + "\n").encode())  # a line is there whole, or not at all
        if row["phase"] == "tile":
            whole = self.folder / "tuned.json.new"
            whole.write_text(json.dumps({line["key"]: line["tile"] for line in self.of("tile")}, indent=1))
            whole.replace(self.folder / "tuned.json")

    def failed(self, unit: str, kind: str, error: str) -> None:
        at_s = round(time.monotonic() - STARTED, 2)
        if kind == "correctness":
            self.add({"phase": kind, "at_s": at_s, "kernel": unit, "error": error, "ok": False})
        else:
            self.add({"phase": "failed", "at_s": at_s, "what": unit, "error": error})

    def of(self, phase: str) -> list[Row]:
        return [row for row in self.rows if row["phase"] == phase]


class Run:
    """Workers, one after the other, until all units are over."""

    def __init__(self, report: Report, job: Row, unit_limit_s: float | None) -> None:
        self._report, self._job, self._limit_s = report, job, unit_limit_s
        self._open: tuple[str, str] | None = None
        self._begun = self._done = False

    def all(self) -> None:
        while not self._done:
            self._begun = False
            code = self._worker()
            hung = code is None
            if self._open is not None:
                unit, kind = self._open
                self._end(unit, kind, "hung: its time was up" if hung else f"its process ended (code {code})")
                if hung and kind == "measure":  # what is left of the model would most likely hang too
                    self._job["over"].append(unit.split(": ")[0] + ": load")
            elif not self._done and not self._begun:
                self._report.failed("worker", "", f"it ended before its first unit (code {code})")
                return
            if time.monotonic() > self._job["end"]:
                return

    def _worker(self) -> int | None:
        """The exit code of one worker; None: a unit took too long, and it was ended."""
        command = [sys.executable, str(WORKER), json.dumps(self._job)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        try:
            for event in self._events(process):
                self._take(event)
            return process.poll()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
                process.wait(END_S)

    def _events(self, process: subprocess.Popen[bytes]) -> Iterator[Row]:
        """What the worker tells, until it ends or a unit hangs."""
        awake, rest = 0.0, b""
        assert process.stdout is not None
        while awake < self._patience():
            before = time.monotonic()
            if select.select([process.stdout], [], [], 0.2)[0]:
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    process.wait(END_S)
                    return
                *lines, rest = (rest + data).split(b"\n")
                yield from map(json.loads, lines)
                awake = 0.0
            else:
                awake += min(1.0, time.monotonic() - before)  # a machine that slept is no unit that hangs

    def _patience(self) -> float:
        own = UNITS_S["begin" if self._open is None else self._open[1]]
        if self._job["quick"]:
            own *= SLOWER_WITHOUT_GPU
        if self._limit_s is not None and self._open is not None:
            own = min(own, self._limit_s)
        return min(own, max(0.0, self._job["end"] + END_S - time.monotonic()))

    def _take(self, event: Row) -> None:
        match event.pop("event"):
            case "row":
                self._report.add(event)
            case "roof":
                self._job["roof"] = event["roof"]
            case "phase":
                self._job["begun"].setdefault(event["name"], event["begun"])
            case "phase over":
                self._job["phases"].pop(event["name"])
            case "begin":
                self._open, self._begun = (event["unit"], event["kind"]), True
            case "end":
                self._end(event["unit"], event["kind"], event.get("error"))
            case "done":
                self._done = True

    def _end(self, unit: str, kind: str, error: str | None) -> None:
        self._open = None
        if error is not None:
            self._report.failed(unit, kind, error)
            self._job["ahead"] &= kind != "ahead"  # the rest goes on without
        if error is not None or kind != "load":  # the next worker has to load what this one has loaded
            self._job["over"].append(unit)


FORMATS = {
    "ahead": "kernels that start ahead: {ahead_us:.2f} us each, one after the other {apart_us:.2f} us",
    "kernel": "  {kernel:42} rows {rows:4} {us:9.1f} us {gb_s:7.0f} GB/s {tflop_s:6.1f} TFLOP/s",
    "decode": "{model:14} decode {batch:4}: {step_ms:8.3f} ms {tok_s:8.0f} tok/s, {share:.0%} of the floor",
    "prefill": "{model:14} prefill {prompt:5}: {ms:8.1f} ms {tok_s:8.0f} tok/s, {share:.0%} of the matrix rate",
    "throughput": "{model:14} throughput: {out_tok_s:.0f} tok/s ({tokens} tokens, {seconds:.1f} s)",
    "first": "{model:14} weights {weights_s:.1f} s, first step {first_step_s:.1f} s, prompts by {prompts_by}",
    "start": "{model:14} start to first token, {cache}: {first_token_s:.1f} s (imports {imported_s:.1f} s, loaded "
    "after {loaded_s:.1f} s)",
}


def lines(report: Report) -> Iterator[str]:
    wrong = [row for row in report.of("correctness") if not row["ok"]]
    yield f"kernels: {len(report.of('correctness'))} cases, {len(wrong)} wrong"
    yield from (f"  WRONG {row['kernel']}: {row['error']}{', ' * ('why' in row)}{row.get('why', '')}" for row in wrong)
    for row in report.of("roof"):
        yield "roof: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items() if k not in ("phase", "at_s"))
    for phase, form in FORMATS.items():
        yield from (form.format(**row) for row in report.of(phase))
    for row in report.of("profile"):
        yield f"{row['model']:14} batch {row['batch']}: kernels {row['busy_us']:.0f} us a step"
        yield from (f"    {top['us']:8.1f} us {top['calls']:6.1f}x {top['kernel']}" for top in row["top"][:8])
    for row in report.of("time"):
        yield "time: {what:12} {seconds:6.1f} s of {limit_s:.0f} s".format(**row)
    yield from (f"FAILED {row['what']}: {row['error']}" for row in report.of("failed"))
    yield from (f"cut: {row.get('model', '')} {row['what']}" for row in report.of("cut"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl, tuned.json and table.txt")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; runs on a CPU too")
    parser.add_argument("--phases", default=",".join(PHASES_S))
    parser.add_argument("--models", default="", help="only these, by name, separated by commas")
    parser.add_argument("--unit-limit", type=float, help="seconds after which a kernel or a measurement counts as hung")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="end after so long; phases have their shares")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report, scratch = Report(args.out), args.out / "scratch"
    job: Row = {
        "quick": args.quick,
        "phases": {name: PHASES_S[name] * args.seconds / TOTAL_S for name in args.phases.split(",")}, "begun": {},
        "started": STARTED, "end": STARTED + args.seconds, "ahead": True, "over": [], "roof": None,
        "folder": str(scratch), "models": [name for name in args.models.split(",") if name],
    }  # fmt: skip
    try:
        Run(report, job, args.unit_limit).all()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        table = "\n".join(lines(report))
        (args.out / "table.txt").write_text(table + "\n")
        print(table)
    if any(not row["ok"] for row in report.of("correctness")) or report.of("failed"):
        sys.exit(1)


if __name__ == "__main__":
    main()
