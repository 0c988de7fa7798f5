"""The heap of a process that has loaded: what only that needed goes back to the system, what stays is let be."""

from __future__ import annotations

import ctypes
import gc


def settle() -> None:
    """Give back what is free, and keep garbage collections off what is there now: vocabulary, templates, programs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
    gc.freeze()
