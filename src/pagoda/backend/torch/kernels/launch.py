"""What launching a kernel needs: block sizes that are powers of two, warps to match, the limits of the GPU, and that
a kernel may get ready while the one before still runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU has of what kernels are cut to."""

    processors: int
    shared_bytes: int
    """Of shared memory, that one program may have."""
    capability: tuple[int, int]


CHAINS_SINCE = (9, 0)
AHEAD = "PAGODA_LAUNCH_AHEAD"
"""A variable of the environment: 0 has kernels start one after the other."""
H200 = Gpu(132, 227 << 10, (9, 0))
INTERPRETER = Gpu(1, 1 << 30, (9, 0))


def block_of(n: int, least: int = 16) -> int:
    """The power of two that holds n."""
    return max(least, 1 << (n - 1).bit_length())


def lines_of(requests: int) -> int:
    """The block in which a kernel looks for its request: one for all usual batches, as each size is a compilation."""
    return block_of(requests, 256)


def warps_for(values: int) -> int:
    """Warps for a tile that is passed over once: 16 values for each thread, 1 to 8 warps."""
    return min(8, max(1, values // 512))


@cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    # what the compiler itself refuses a kernel by
    shared_bytes = int(driver.active.utils.get_device_properties(index)["max_shared_mem"])
    return Gpu(found.multi_processor_count, shared_bytes, (found.major, found.minor))


def chained(device: torch.device) -> dict[str, bool]:
    """Options with which a kernel is started as soon as there is room, ahead of the end of the one before it."""
    if device.type == "cpu" or gpu_of(device).capability < CHAINS_SINCE or os.environ.get(AHEAD) == "0":
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}


@triton.jit
def await_others(CHAINED: tl.constexpr) -> None:
    """Every program of a kernel waits here, before it reads what others write and before it writes anything itself:
    what the kernels before have written is there now. Then the kernel behind may get ready.
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_ahead(begin: tl.tensor, nbytes: tl.tensor, LINES: tl.constexpr, CHAINED: tl.constexpr) -> None:
    """So many bytes behind each address (int64), in so many lines of 128 at most, on their way to the cache that all
    share, before `await_others`: weights, which no kernel writes.
    """
    if CHAINED:
        if nbytes > 0:
            at = begin[:, None] + tl.minimum(tl.arange(0, LINES) * 128, nbytes - 1)[None, :]
            tl.inline_asm_elementwise(
                "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                "=r,l",
                [at],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def joined(
    own: tl.tensor,
    place: tl.tensor,
    step: tl.tensor,
    part: tl.tensor,
    arrived: tl.tensor,
    inside: tl.tensor,
    SPLIT: tl.constexpr,
) -> Any:
    """The sum of the parts of SPLIT programs, in order, in the last of them to arrive, which sets the counter back; and
    whether this is that one. `place`: of the first part, those of the others are `step` apart."""
    tl.store(place + part.to(tl.int64) * step, own, mask=inside)
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == SPLIT - 1
    if last:
        own = tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
        for each in range(1, SPLIT):
            own += tl.load(place + each * step, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(arrived, 0)
    return own, last


def arrivals(device: torch.device, count: int) -> torch.Tensor:
    """So many counters of programs that share a result: 0 before and after each kernel, which run one by one."""
    return _counters(device, block_of(count, 1 << 16))


@cache
def _counters(device: torch.device, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
