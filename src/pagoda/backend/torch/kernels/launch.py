"""What launching a kernel needs: block sizes that are powers of two, warps to match, the size of the GPU."""

from __future__ import annotations

from functools import cache

import torch


def block_of(n: int, least: int = 16) -> int:
    """The power of two that holds n."""
    return max(least, 1 << (n - 1).bit_length())


def warps_for(values: int) -> int:
    """Warps for a tile that is passed over once: 16 values for each thread, 1 to 8 warps."""
    return min(8, max(1, values // 512))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def arrivals(device: torch.device) -> torch.Tensor:
    """Counters of programs that share a result: 0 before and after each kernel, which run one after the other."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)
