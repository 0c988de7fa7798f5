"""What a stand-in for a GPU is made of: tensors that the host cannot read, memory, late copies, streams, graphs."""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

CPU = torch.device("cpu")
_POISON_INT = -77_777_777


_now: list[Any] = []


def current() -> Any:
    """The stand-in that there is now."""
    return _now[-1]


class Forbidden(BaseException):
    """What a GPU would refuse, or do wrong."""


class Block:
    """An allocation: it counts as long as a tensor uses it."""

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        nbytes = -(-nbytes // 512) * 512
        gpu.take(nbytes)
        self.recorded = gpu.graph is not None
        weakref.finalize(self, gpu.give, nbytes)


class DeviceTensor(torch.Tensor):
    """Says it is on a GPU; its numbers are in `held`."""

    held: torch.Tensor
    block: Block
    _place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, place: torch.device, block: Block) -> DeviceTensor:
        shape = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        self: DeviceTensor = torch.Tensor._make_subclass(  # type: ignore[attr-defined]
            cls, shape, False, dispatch_device=False, device_for_backend_keys=place
        )
        self.held, self.block, self._place = inner, block, place
        return self

    @property
    def device(self) -> torch.device:
        return self._place

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.to(CPU)

    def item(self) -> Any:
        return self.cpu().item()

    def __bool__(self) -> bool:
        return bool(self.cpu())

    def __int__(self) -> int:
        return int(self.cpu())

    def __float__(self) -> float:
        return float(self.cpu())

    __index__ = __int__

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Forbidden(f"{func} in a thread that knows no GPU")


@dataclass
class Late:
    """A copy that is under way: `host` is its pinned memory, `data` what arrives there, or None: it goes away."""

    host: torch.Tensor
    data: torch.Tensor | None
    sum: int


def checksum(values: torch.Tensor) -> int:
    return zlib.crc32(values.contiguous().view(-1).view(torch.uint8).numpy()) if values.numel() else 0


@torch.inference_mode()
def poison(values: torch.Tensor) -> None:
    if values.dtype.is_floating_point and values.dtype.itemsize > 1:
        values.fill_(float("nan"))
    elif values.dtype in (torch.int32, torch.int64):
        values.fill_(_POISON_INT)
    else:
        values.view(torch.uint8).fill_(0x7F)


@dataclass
class Gpu:
    """One device: its memory, and its one stream of work."""

    index: int
    total_bytes: int
    held_bytes: int = 0  # by others
    allocated: int = 0
    reserved: int = 0
    peak: int = 0
    late: list[Late] = field(default_factory=list)
    arrived: int = 0  # copies that did so before the first of `late`
    graph: Graph | None = None  # that is being recorded
    lock: Any = field(default_factory=threading.RLock)  # a collection of garbage may come within it

    def take(self, nbytes: int) -> None:
        with self.lock:
            if self.allocated + nbytes > self.total_bytes - self.held_bytes:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.")
            self.allocated += nbytes
            self.reserved = max(self.reserved, self.allocated)
            self.peak = max(self.peak, self.reserved)

    def give(self, nbytes: int) -> None:
        with self.lock:
            self.allocated -= nbytes

    def add(self, copy: Late) -> None:
        with self.lock:
            self.late.append(copy)

    def wait(self, until: int | None = None) -> None:
        """For all copies, or so many since the start."""
        if self.graph is not None:
            raise Forbidden("a recording waits for the device")
        with self.lock:
            count = len(self.late) if until is None else max(0, until - self.arrived)
            for copy in self.late[:count]:
                if copy.data is not None:
                    with torch.inference_mode():
                        copy.host.copy_(copy.data)
                elif checksum(copy.host) != copy.sum:
                    raise Forbidden("pinned memory was written before its copy to the device was waited for")
            del self.late[:count]
            self.arrived += count


class Event:
    def __init__(self, **_: Any) -> None:
        self._of: tuple[Gpu, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        gpu = stream.gpu if stream else current().here
        self._of = gpu, gpu.arrived + len(gpu.late)

    def synchronize(self) -> None:
        if self._of is not None:
            self._of[0].wait(self._of[1])


class Stream:
    def __init__(self, gpu: Gpu | None = None) -> None:
        self.gpu = gpu or current().here

    def synchronize(self) -> None:
        self.gpu.wait()


class Graph:
    """See torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.work: list[Callable[[], None]] = []
        self.outside: dict[int, weakref.ref[Block]] = {}
        self.made: list[torch.Tensor] = []
        self.replays = 0
        current().graphs.append(self)

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        self.gpu = current().here
        if self.gpu.graph is not None:
            raise Forbidden("two recordings at once")
        self.gpu.graph = self

    def capture_end(self) -> None:
        self.gpu.graph = None
        for tensor in self.made:  # nothing was computed yet
            poison(tensor)

    def add(self, work: Callable[[], None], used: list[DeviceTensor]) -> None:
        self.work.append(work)
        for tensor in used:
            if not tensor.block.recorded:
                self.outside[id(tensor.block)] = weakref.ref(tensor.block)

    def replay(self) -> None:
        if any(block() is None for block in self.outside.values()):
            raise Forbidden("a replay reads or writes memory that was freed since it was recorded")
        self.replays += 1
        with torch.inference_mode(False):
            for work in self.work:
                work()
