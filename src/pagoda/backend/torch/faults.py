"""What goes wrong on a GPU: what of it ends a load, a step or the engine, and what is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton import TritonError

from pagoda.errors import EngineError, MemoryShort

_log = logging.getLogger(__name__)


@contextmanager
def memory_told() -> Iterator[None]:
    """What was worked out before a model is loaded may not suffice: others take memory meanwhile."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        _log.warning("%s", error)
        raise MemoryShort(
            "the memory of the GPU ran out while the model was loaded",
            remedy="Free what `nvidia-smi` shows, or give a smaller --max-num-batched-tokens or --max-num-seqs",
        ) from error


@contextmanager
def errors_told(work: str) -> Iterator[None]:
    """The libraries' own words are for the log: the text of an EngineError reaches clients."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise device_lost(work) from error
    except torch.OutOfMemoryError as error:
        _log.exception("%s: no memory for the least that can be computed", work)
        raise EngineError("the GPU has no memory left for this step") from error
    except (IndexError, ValueError, RuntimeError, TritonError) as error:
        if broken():
            raise device_lost(work) from error
        _log.exception("%s failed", work)
        raise EngineError("the step failed") from error


def broken() -> bool:
    """Whether the GPU serves this process no more: Triton and cuBLAS say a fault in words of their own."""
    try:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def device_lost(work: str) -> SystemExit:
    """After a fault the GPU serves this process no more."""
    return engine_lost(f"{work} broke the GPU's context")


def engine_lost(why: str) -> SystemExit:
    """The error under way is logged; this process ends, and the server starts another one."""
    _log.critical("%s; the engine ends", why, exc_info=True)
    return SystemExit(EngineError.exit_code)
