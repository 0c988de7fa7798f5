"""What launching a kernel needs: block sizes that are powers of two, and warps to match."""

from __future__ import annotations


def block_of(n: int, least: int = 16) -> int:
    """The power of two that holds n."""
    return max(least, 1 << (n - 1).bit_length())


def warps_for(values: int) -> int:
    """Warps for a tile that is passed over once: 16 values for each thread, 1 to 8 warps."""
    return min(8, max(1, values // 512))
