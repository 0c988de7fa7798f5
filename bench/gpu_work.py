"""The half of bench/gpu.py that may break: does one unit of work after the other, and tells each event in a line."""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
JOB = json.loads(sys.argv[1])
"""`quick`; `phases` with the seconds each may take; `end`, of all (a clock that processes share); `begun`, when phases
began; `over`, units that are not to be done; `ahead`, whether kernels start ahead; `roof`, if measured; `models` to
take, none: all; `folder` for files."""
EVENTS = os.dup(1)
os.dup2(2, 1)  # what a library prints is no event
if JOB["quick"] and not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import gpu_cases  # noqa: E402
import gpu_kernels as kernels  # noqa: E402
import gpu_models  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

from pagoda.backend.torch import toolchain  # noqa: E402
from pagoda.backend.torch.kernels.launch import AHEAD  # noqa: E402

Row = dict[str, Any]
SMALL: bool = JOB["quick"]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32  # the interpreter does not multiply bfloat16
BROKEN = 70
SHAPES = [(48, 128)] if SMALL else [
    (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (1024, 3072), (6144, 1024), (51200, 5120), (5120, 25600),
]  # fmt: skip


def tell(event: str, **fields: Any) -> None:
    os.write(EVENTS, (json.dumps({"event": event, **fields}) + "\n").encode())


def row(phase: str, fields: Row) -> None:
    tell("row", phase=phase, at_s=round(time.monotonic() - JOB["started"], 2), **fields)


def unit(name: str, kind: str, work: Callable[[], Iterable[tuple[str, Row]]]) -> bool:
    """Do a unit, unless it is over; whether that went well. What goes wrong is told, and hides nothing else."""
    if name in JOB["over"]:
        return True
    tell("begin", unit=name, kind=kind)
    try:
        for phase, fields in work():
            row(phase, fields)
    except Exception as error:
        if kind == "ahead":
            os.environ[AHEAD] = "0"
        tell("end", unit=name, kind=kind, error=told(error))
        if GPU:
            try:
                torch.cuda.synchronize()
            except Exception:  # the GPU serves this process no more: another one goes on
                os._exit(BROKEN)
        return False
    tell("end", unit=name, kind=kind)
    return True


def told(error: Exception) -> str:
    """Its text, or where that is long both ends of it: a compiler says at one what is wrong, at the other where."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 800 else f"{text[:300]} ... {text[-500:]}"


def free() -> None:
    """Give the memory of what is done with back: the next model looks how much there is."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def ahead(end: float) -> Iterator[bool]:
    yield unit("kernels that start ahead", "ahead", lambda: [("ahead", kernels.ahead_row(DTYPE, DEVICE, SMALL))])


def correctness(end: float) -> Iterator[bool]:
    for name, call in gpu_cases.cases(DTYPE, DEVICE, SMALL):
        yield unit(name, "correctness", lambda n=name, c=call: [("correctness", gpu_cases.compared(n, c, DEVICE))])  # type: ignore[misc]


def micro(end: float) -> Iterator[bool]:
    for name, measure in kernels.micro(SHAPES, DTYPE, DEVICE, SMALL):
        yield unit(f"{name} alone", "kernel", lambda m=measure: [("kernel", m())])  # type: ignore[misc]


def autotune(end: float) -> Iterator[bool]:
    for name, tune in kernels.autotune(SHAPES if not SMALL else [(64, 128)], DTYPE, DEVICE, SMALL, end):

        def found(tune: kernels.Tuning = tune) -> Iterator[tuple[str, Row]]:
            if (best := tune()) is not None:
                key, tile, fields = best
                yield "tile", {"key": key, "tile": asdict(tile), **fields}

        yield unit(f"{name} tiles", "tile", found)


def measured(name: str, config: Row, kind: str, ranks: int, until: float) -> Iterator[bool]:
    title = name if ranks == 1 else f"{name} x{ranks}"

    def left(until: float) -> list[tuple[str, str, Callable[[gpu_models.Model], Row]]]:
        measures = gpu_models.measures(name, SMALL, JOB["roof"], until)
        return [measure for measure in measures if f"{title}: {measure[0]}" not in JOB["over"]]

    if not left(until) or f"{title}: load" in JOB["over"]:
        return
    made, began = list[gpu_models.Model](), time.monotonic()

    def load() -> Iterator[tuple[str, Row]]:
        made.append(gpu_models.Model(name, config, kind, Path(JOB["folder"]) / title, SMALL, ranks))
        yield from ()

    def close() -> Iterator[tuple[str, Row]]:
        made.pop().core.close()
        yield from ()

    if not unit(f"{title}: load", "load", load):
        return
    until = min(until + time.monotonic() - began, JOB["end"])  # what a load compiles is not the measures' time
    try:
        for what, phase, measure in left(until):
            if time.monotonic() > until:
                row("cut", {"model": title, "what": what})
                break

            def work(phase: str = phase, measure: Callable[[gpu_models.Model], Row] = measure) -> Any:
                try:
                    yield phase, measure(made[0])
                finally:
                    made[0].clear()

            yield unit(f"{title}: {what}", "measure", work)
    finally:  # also where the time of the phase is up: the next one needs the memory
        unit(f"{title}: close", "load", close)


def models(end: float) -> Iterator[bool]:
    table = gpu_models.TINY_MODELS if SMALL else gpu_models.MODELS
    chosen = [(name, *made) for name, made in table.items() if not JOB["models"] or name in JOB["models"]]
    for left, (name, config, kind) in zip(range(len(chosen), 0, -1), chosen, strict=True):
        now = time.monotonic()
        with nullcontext() if GPU else kernels.dispatch(True):
            yield from measured(name, config, kind, 1, now + min(1.0, 1.6 / left) * (end - now))
        free()
        yield True


def parallel(end: float) -> Iterator[bool]:
    """Models shared by several GPUs, where there are several; without any, by two processes on the CPU."""
    count, names = (torch.cuda.device_count(), gpu_models.PARALLEL) if GPU else (2, ("tiny-experts",))
    table = gpu_models.TINY_MODELS if SMALL else gpu_models.MODELS
    for name in names:
        for ranks in (2, 4, 8):
            if ranks <= count and (not JOB["models"] or name in JOB["models"]):
                yield from measured(name, *table[name], ranks, end)
                free()


def start(end: float) -> Iterator[bool]:
    def work() -> Iterator[tuple[str, Row]]:
        for fields in gpu_models.start(Path(JOB["folder"]) / "start", SMALL, end - time.monotonic()):
            yield "start", fields

    yield unit("start", "start", work)


PHASES: dict[str, Callable[[float], Iterator[bool]]] = {
    "ahead": ahead, "correctness": correctness, "kernels": micro, "models": models, "parallel": parallel,
    "start": start, "autotune": autotune,
}  # fmt: skip


def phase(name: str, limit_s: float) -> None:
    """The units of a phase, until its time is up; each is a unit of its own for the one who watches."""
    begun = JOB["begun"].get(name, time.monotonic())
    tell("phase", name=name, begun=begun)
    end = min(begun + limit_s, JOB["end"])
    free()
    with nullcontext() if name in ("models", "parallel", "start") else torch.inference_mode():
        units = PHASES[name](end)
        while time.monotonic() < end:
            try:
                next(units)
            except StopIteration:
                break
            except Exception as error:  # outside of any unit: what is left of the phase is lost, the next one is not
                row("failed", {"what": name, "error": told(error)})
                break
        else:
            row("cut", {"what": name})
        units.close()  # type: ignore[attr-defined]
    row("time", {"what": name, "seconds": time.monotonic() - begun, "limit_s": limit_s})
    tell("phase over", name=name)


def roof() -> Iterator[tuple[str, Row]]:
    JOB["roof"] = kernels.roofs(DTYPE, DEVICE, SMALL)
    yield "roof", JOB["roof"]


def main() -> None:
    if not GPU and not SMALL:
        sys.exit("no GPU here; --quick runs everything on tiny shapes on a CPU")
    if not JOB["ahead"]:
        os.environ[AHEAD] = "0"
    toolchain.use_writable_cache(os.environ)
    if GPU and (error := toolchain.lacking(os.environ)):
        row("failed", {"what": "machine", "error": f"{error.message}. {error.remedy}"})
    torch.manual_seed(0)
    if JOB["roof"] is None:
        if "roof" not in JOB["over"]:
            name = torch.cuda.get_device_name() if GPU else "CPU, Triton's interpreter"
            versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
            count = torch.cuda.device_count()
            row("machine", {"device": name, "gpus": count, **versions, "imported_s": time.monotonic() - STARTED})
        with torch.inference_mode():
            unit("roof", "kernel", roof)
        JOB["roof"] = JOB["roof"] or kernels.SUPPOSED
        tell("roof", roof=JOB["roof"])
    for name, limit_s in JOB["phases"].items():
        phase(name, limit_s)
    tell("done")


if __name__ == "__main__":
    main()
