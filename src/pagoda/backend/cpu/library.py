"""The native library through ctypes: one object per loaded model."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagoda.backend.cpu.records import (
    PLAN_ARRAYS,
    RESULT_ARRAYS,
    TYPES,
    BufferShape,
    Dims,
    LowRank,
    Op,
    Part,
    Picture,
    Step,
)
from pagoda.errors import ConfigError, EngineError, MemoryShort, ModelError
from pagoda.types import Float32, Int32, StepPlan, StepResult


def _load() -> c.CDLL:
    path = Path(__file__).with_name("libpagoda_cpu.so")
    if not path.exists():
        raise ConfigError("the native CPU library is missing", remedy="Install the package again: pip install .")
    return _opened(path)


@cache
def _opened(path: Path) -> c.CDLL:
    lib = c.CDLL(str(path))
    signatures: dict[str, tuple[object, list[object]]] = {
        "pg_best_isa": (c.c_char_p, []),
        "pg_isa": (c.c_char_p, [c.c_int32]),
        "pg_create": (c.c_void_p, [c.c_int32, c.c_char_p]),
        "pg_destroy": (None, [c.c_void_p]),
        "pg_error": (c.c_char_p, [c.c_void_p]),
        "pg_matrix_bytes": (c.c_int64, [c.c_int32, c.c_int64, c.c_int64]),
        "pg_weight": (c.c_int32, [c.c_void_p, c.POINTER(Part), c.c_int32]),
        "pg_extend": (c.c_int32, [c.c_void_p, c.c_int32, c.POINTER(Part), c.c_int32]),
        **dict.fromkeys(("pg_vector", "pg_order"), (c.c_int32, [c.c_void_p, c.c_void_p, c.c_int64])),
        "pg_weight_bytes": (c.c_int64, [c.c_void_p]),
        "pg_program": (
            c.c_int32,
            [c.c_void_p, *map(c.POINTER, (Dims, BufferShape)), c.c_int32, c.POINTER(Op), c.c_int32],
        ),
        "pg_adapt": (c.c_int32, [c.c_void_p, c.c_int32, c.POINTER(LowRank), c.c_int32]),
        "pg_activation_bytes": (c.c_int64, [c.c_void_p]),
        "pg_release": (None, [c.c_void_p]),
        "pg_touch": (c.c_int32, [c.c_void_p, c.c_int64]),
        "pg_start": (c.c_int32, [c.c_void_p, c.POINTER(Step)]),
        "pg_wait": (None, [c.c_void_p]),
        "pg_begin": (c.c_int32, [c.c_void_p, c.POINTER(Step)]),
        "pg_continue": (c.c_int32, [c.c_void_p, c.c_double]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def isas() -> list[str]:
    """The instruction sets this machine can run, the best first."""
    found: list[str] = []
    while (name := _load().pg_isa(len(found))) is not None:
        found.append(name.decode())
    return found


def describe() -> str:
    """Which kernels a model loaded now would run, and which this machine has."""
    chosen, found = os.environ.get("PAGODA_CPU_ISA"), isas()
    if chosen and chosen not in found:
        return f"{chosen} by PAGODA_CPU_ISA, which this processor cannot run (available: {', '.join(found)})"
    return f"{chosen or found[0]}{' by PAGODA_CPU_ISA' if chosen else ''} (available: {', '.join(found)})"


def matrix_bytes(kind: str, rows: int, k: int) -> int:
    """Bytes of a repacked matrix; a type that the kernels do not know is widened to float32."""
    known = int(_load().pg_matrix_bytes(TYPES.get(kind, -1), rows, k))
    return known if known >= 0 else int(_load().pg_matrix_bytes(TYPES["F32"], rows, k))


class Native:
    """A model in the native library: weights first, then its program, then steps.

    `isa` is "auto" or a name from native/src/pagoda.h; the environment variable PAGODA_CPU_ISA overrides "auto".
    Raises ConfigError if this machine cannot run it.
    """

    def __init__(self, threads: int, isa: str = "auto") -> None:
        self._lib = _load()
        if isa == "auto":
            isa = os.environ.get("PAGODA_CPU_ISA") or self._lib.pg_best_isa().decode()
        self._handle = self._lib.pg_create(threads, isa.encode())
        if not self._handle:
            best = self._lib.pg_best_isa().decode()
            raise ConfigError(f"this processor cannot run {isa!r}", remedy=f"Unset PAGODA_CPU_ISA, or set it to {best}")
        self.isa, self.threads = isa, threads
        self._hidden = 0
        self._step = Step()
        self._begun: object = None  # what a step in parts points to
        self._tops: object = None  # of the last plan, and the largest of them
        self._width = 0
        self._plan: StepPlan | None = None
        self._planned: list[object] = [None] * len(PLAN_ARRAYS)  # the arrays that `_step` points to
        self._started = False
        self._logits: Float32 | None = None
        self._images: tuple[Float32, Int32] | None = None
        self._result: StepResult | None = None

    def weight(
        self,
        parts: Sequence[tuple[npt.NDArray[np.uint8], int, int, str]],
        panel_types: Sequence[str] = (),
        behind: int = -1,
    ) -> int:
        """Repack matrices of one k, stacked along rows: (bytes, rows, k, type) each. Returns the weight's id.

        `panel_types`, if given, is what each becomes: its own type, or Q8_0, Q5_1 or Q4_1 for a float one.
        `behind`: the weight that they are stacked behind; a new one if -1.
        """
        array = (Part * len(parts))()
        for i, (data, rows, k, kind) in enumerate(parts):
            becomes = panel_types[i] if panel_types else kind
            array[i] = Part(data.ctypes.data, rows, k, TYPES[kind], 0 if becomes == kind else TYPES[becomes])
        if behind < 0:
            return self._checked(self._lib.pg_weight(self._handle, array, len(parts)), ModelError)
        self._checked(self._lib.pg_extend(self._handle, behind, array, len(parts)), ModelError)
        return behind

    def vector(self, values: npt.NDArray[np.float32]) -> int:
        return self._checked(self._lib.pg_vector(self._handle, values.ctypes.data, values.size), ModelError)

    def order(self, places: npt.NDArray[np.int32]) -> int:
        """For the field `order` of an operation: value k of its output becomes the one that was at places[k]."""
        return self._checked(self._lib.pg_order(self._handle, places.ctypes.data, places.size), ModelError)

    def program(self, dims: Dims, buffers: Sequence[BufferShape], ops: Sequence[Op], hidden: int = 0) -> None:
        """Fix the program. `hidden`: width of the hidden states that it gives in place of tokens."""
        result = self._lib.pg_program(
            self._handle, dims, (BufferShape * len(buffers))(*buffers), len(buffers), (Op * len(ops))(*ops), len(ops)
        )
        self._checked(result, MemoryShort)
        self._hidden = hidden

    def adapt(self, place: int, pairs: Sequence[tuple[int, int, Float32, Float32]]) -> None:
        """Put an adapter in a place: (weight, first output, down [rank, k], up [outputs, rank]) each."""
        if self._started:
            self.wait()
        array = (LowRank * len(pairs))()
        for i, (weight, column, down, up) in enumerate(pairs):
            array[i] = LowRank(weight, len(down), column, len(up), down.ctypes.data, up.ctypes.data)
        self._checked(self._lib.pg_adapt(self._handle, place, array, len(pairs)), MemoryShort)

    @property
    def weight_bytes(self) -> int:
        return int(self._lib.pg_weight_bytes(self._handle))

    @property
    def activation_bytes(self) -> int:
        return int(self._lib.pg_activation_bytes(self._handle))

    def touch(self, ahead_bytes: int) -> bool:
        """Take a page more of the cache from the system, up to `ahead_bytes` behind what is used; False: all is there.

        Only while no step is started.
        """
        return bool(self._lib.pg_touch(self._handle, ahead_bytes))

    def run(
        self, plan: StepPlan, logits: Float32 | None = None, images: tuple[Float32, Int32] | None = None
    ) -> StepResult:
        """One step, start to end. `logits` [L, vocab] receives the raw logits if given (for tests)."""
        self._result = None
        self.start(plan, logits, images)
        return self.wait()

    def start(self, plan: StepPlan, logits: Float32 | None = None, images: tuple[Float32, Int32] | None = None) -> None:
        """Start a step on the other threads; with one thread it is all done in `wait`.

        `images`: vectors, and for each token the one that it takes, or -1 for its embedding.
        """
        if self._started:  # nobody waited for it; its arrays are let go now
            self.wait()
        step = self._step
        self._place_result(len(plan.rows), plan.row_top)
        if plan is not self._plan:
            self._point_to(plan)
        if logits is not self._logits or images is not self._images:
            self._logits, self._images = logits, images
            step.out_logits = _address(logits)
            step.vectors, step.vector_of = map(_address, images or (None, None))
            step.vectors_width = images[0].shape[1] if images else 0
        self._checked(self._lib.pg_start(self._handle, step), EngineError)
        self._started = True

    def _point_to(self, plan: StepPlan) -> None:
        step, self._plan = self._step, plan
        step.requests, step.tokens_count = len(plan.slots), len(plan.tokens)
        step.table_width, step.mask_width = plan.block_tables.shape[1], plan.masks.shape[1]
        for place, name in enumerate(PLAN_ARRAYS):
            array = getattr(plan, name)
            if array is not self._planned[place]:  # most stay from step to step, and an address costs a microsecond
                self._planned[place] = array
                setattr(step, name, _address(array))

    def _place_result(self, rows: int, tops: Int32) -> None:
        """Where the result goes: the arrays of the step before, where each of their values is written anew."""
        if tops is not self._tops:
            self._tops, self._width = tops, max(0, int(tops.max())) if rows else 0
        width = self._width
        if self._result is not None and not width and not self._hidden and len(self._result.tokens) == rows:
            return
        self._result = result = StepResult(
            tokens=np.zeros(rows, np.int32),
            logprobs=np.zeros(rows, np.float32),
            top_ids=np.full((rows, width), -1, np.int32),
            top_logprobs=np.zeros((rows, width), np.float32),
            ok=np.zeros(rows, np.uint8),
            hidden=np.empty((rows, self._hidden), np.float32) if self._hidden else None,
        )
        step = self._step
        step.rows_count, step.top_width = rows, width
        for name in RESULT_ARRAYS:
            setattr(step, "out_" + name, _address(getattr(result, name)))
        step.out_hidden, step.hidden_width = _address(result.hidden), self._hidden

    def wait(self) -> StepResult:
        """Work on the step until it is done, without the GIL. Its result is good until the next one is started."""
        self._lib.pg_wait(self._handle)
        self._started, result = False, self._result
        if result is None:
            raise EngineError("no step was started")
        if result.hidden is not None:
            result.ok[:] = np.isfinite(result.hidden).all(axis=1)
        return result

    def begin(
        self,
        picture: Picture,
        pixels: npt.NDArray[np.uint8],
        positions: Int32,
        windows: Int32,
        frames: Int32,
        rows: Int32,
        out: Float32,
        added: Float32 | None = None,
    ) -> None:
        """Begin to make the vectors `out` [len(rows), ...] of a picture, by the program of a vision encoder.

        `positions` [3, P] are the group of frames, the row and the column of its patches, in the order of their
        windows; windows and frames begin where these say, with the end behind the last; vector l is made of the patches
        from rows[l] on. `added` [P, ...] is what ADD_VECTORS adds to them.
        """
        patches = positions.shape[1]
        zeros = np.zeros(patches, np.int32)
        step = Step(requests=len(windows) - 1, tokens_count=patches, rows_count=len(rows))
        step.frames_count, step.hidden_width, step.picture = len(frames) - 1, out.shape[1], c.pointer(picture)
        arrays = {
            "slots": zeros, "positions": zeros, "tokens": zeros, "starts": windows, "rows": rows,
            "rope_positions": positions, "frames": frames, "out_hidden": out,
        }  # fmt: skip
        if added is not None:
            arrays |= {"vectors": added, "vector_of": np.arange(patches, dtype=np.int32)}
            step.vectors_width = added.shape[1]
        for name, array in arrays.items():
            setattr(step, name, _address(array))
        picture.pixels = _address(pixels)
        self._begun = (step, picture, pixels, arrays)
        self._checked(self._lib.pg_begin(self._handle, step), EngineError)

    def go_on(self, most_s: float) -> bool:
        """Go on with what was begun for about so long; True once it is done."""
        if not self._lib.pg_continue(self._handle, most_s):
            return False
        self._lib.pg_release(self._handle)  # the next image may be hours away
        self._begun = None
        return True

    def close(self) -> None:
        if self._handle:
            self._lib.pg_destroy(self._handle)
            self._handle = None

    def _checked(self, result: int, error: type[ModelError] | type[MemoryShort] | type[EngineError]) -> int:
        if result < 0:
            raise error(self._lib.pg_error(self._handle).decode())
        return result


def _address(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else int(array.ctypes.data)
