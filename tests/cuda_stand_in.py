"""A stand-in for the CUDA side of PyTorch: tensors that say they are on a GPU, held in the memory of the CPU.

It forbids what a GPU forbids, and does late what a GPU does late:
- a tensor there has no numbers for Python: to read one is a copy, which waits for the device; one that does not wait
  (pinned memory, `non_blocking`) arrives when an event behind it, or its stream, was waited for, and is poison before;
- the pinned memory of a copy to the device must not change until the same;
- what is allocated holds poison, counts, and is refused where the memory is full;
- within the recording of a graph nothing is computed, and nothing may wait, copy from or to the host, or have a shape
  that depends on values; a replay computes what was recorded in the memory of then, which must still be there;
- an exchange between devices is part of a graph at all of them or at none;
- operations join tensors of one device; a kernel of Triton runs on the device that is the thread's own.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import cuda_tensors
import pytest
import torch
import torch.distributed as dist
from cuda_tensors import CPU, Block, DeviceTensor, Event, Forbidden, Gpu, Graph, Late, Stream, checksum, current, poison
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from triton.runtime import interpreter

from pagoda.backend.torch import convert, device, load
from pagoda.backend.torch.kernels import launch

_COPIES = ("to", "_to_copy", "copy_", "cpu", "cuda")
_READ_BACK = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose")
_SHAPED_BY_VALUES = ("nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount", "argwhere")
_FRESH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class StandIn(TorchDispatchMode):
    """Takes every operation of PyTorch, in the threads that entered it."""

    def __init__(self, gpus: int, total_bytes: int) -> None:
        super().__init__()
        self.gpus = [Gpu(i, total_bytes) for i in range(gpus)]
        self.pinned: dict[int, torch.Tensor] = {}
        self.waits: list[str] = []
        """Where the host waited for a device, and did not say so by an event, a stream or `synchronize`."""
        self.graphs: list[Graph] = []
        self.stream: Stream | None = None  # beside the device's own
        self._own = threading.local()

    def begin_thread(self) -> None:
        self.__enter__()
        self._own.inference = torch.inference_mode()  # where operations are seen before they are taken apart
        self._own.inference.__enter__()

    @property
    def here(self) -> Gpu:
        return self.gpus[self.index]

    @property
    def index(self) -> int:
        """The device of this thread: the first one, unless it has said another."""
        return getattr(self._own, "index", 0)

    @index.setter
    def index(self, index: int) -> None:
        self._own.index = index

    def gpu_of(self, place: Any) -> Gpu:
        if place is None or isinstance(place, int):
            return self.gpus[self.index if place is None else place]
        index = torch.device(place).index
        return self.gpus[self.index if index is None else index]

    def wait(self, gpu: Gpu, why: str) -> None:
        if gpu.graph is not None:
            raise Forbidden(f"a recording waits for the device: {why}")
        self.waits.append(f"{why}\n" + "".join(traceback.format_stack(limit=14)[:-3]))
        gpu.wait()

    def _recording(self, place: Any) -> Graph | None:
        graph = self.gpu_of(place).graph
        if graph is None and self.stream is not None:
            raise Forbidden("work on a stream that nobody waits for")
        return graph

    def put(self, inner: torch.Tensor, place: torch.device) -> DeviceTensor:
        gpu = self.gpu_of(place)
        block = Block(gpu, inner.untyped_storage().nbytes())
        return DeviceTensor(inner, torch.device("cuda", gpu.index), block)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, _ = tree_flatten((args, kwargs or {}))
        given = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        asked = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        name = func.overloadpacket.__name__
        if not given and (asked is None or asked.type != "cuda"):
            return self._on_host(func, name, args, dict(kwargs or {}))
        with torch.inference_mode(False):
            return self._on_gpu(func, name, args, kwargs, asked)

    def _on_gpu(self, func: Any, name: str, args: Any, kwargs: Any, asked: torch.device | None) -> Any:
        leaves, shape = tree_flatten((args, kwargs or {}))
        given = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        if name in _COPIES and (name == "copy_" or asked is not None):
            return self._copied(func, name, args, dict(kwargs or {}), asked)
        place = self._place_of(func, name, leaves, given, asked)
        self._refuse(name, leaves, place)
        inner = [CPU if isinstance(x, torch.device) else getattr(x, "held", x) for x in leaves]
        return self._run(func, name, tree_unflatten(inner, shape), given, place)

    def _on_host(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "is_pinned":
            return args[0].untyped_storage().data_ptr() in self.pinned
        if name not in ("pin_memory", "_pin_memory"):
            pinned = kwargs.pop("pin_memory", None)
            out = func(*args, **kwargs)
        else:
            pinned, out = True, args[0].clone()
        if pinned:
            poison(out) if name in _FRESH else None
            self.pinned[out.untyped_storage().data_ptr()] = out
        return out

    def _place_of(
        self, func: Any, name: str, leaves: list[Any], given: list[DeviceTensor], asked: torch.device | None
    ) -> torch.device:
        if asked is not None:
            return torch.device("cuda", self.gpu_of(asked).index)
        hosts = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor) and x.dim()]
        places = {tensor.device for tensor in given}
        if len(places) > 1 or (hosts and name not in ("index", "index_put_", "_index_put_impl_")):
            found = sorted({str(x.device) for x in (*given, *hosts)})
            raise Forbidden(f"{func} of tensors on {', '.join(found)}")
        if hosts:
            self.wait(self.gpu_of(given[0].device), "an index is sent there")
        return given[0].device

    def _refuse(self, name: str, leaves: list[Any], place: torch.device) -> None:
        gpu = self.gpu_of(place)
        masks = name in ("index", "index_put_", "_index_put_impl_") and any(
            isinstance(x, DeviceTensor) and x.dtype == torch.bool for x in leaves[1:]
        )
        if name in _READ_BACK or name in _SHAPED_BY_VALUES or masks:
            self.wait(gpu, f"{name} reads values")
        if name == "repeat_interleave" and sum(isinstance(x, DeviceTensor) for x in leaves) > 1:
            self.wait(gpu, "repeat_interleave has a shape that depends on values")

    def _run(self, func: Any, name: str, call: Any, given: list[DeviceTensor], place: torch.device) -> Any:
        args, kwargs = call
        kwargs.pop("pin_memory", None)
        graph = self._recording(place)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if graph is not None and writes:
            graph.add(lambda: func(*args, **kwargs), given)
            return next(x for x in given if x.held is _written(func, args, kwargs))
        made = func(*args, **kwargs)
        fresh: list[torch.Tensor] = []
        out = tree_map_only(torch.Tensor, lambda inner: self._wrapped(inner, given, place, fresh), made)
        for inner in fresh:
            if name in _FRESH:
                poison(inner) if graph is None else inner.zero_()
        if graph is not None and fresh:
            graph.made += fresh
            if name not in _FRESH:
                graph.add(lambda: _again(func, args, kwargs, made), given)
        return out

    def _wrapped(
        self, inner: torch.Tensor, given: list[DeviceTensor], place: torch.device, fresh: list[torch.Tensor]
    ) -> DeviceTensor:
        for tensor in given:
            if tensor.held is inner:
                if inner.shape != tensor.shape:
                    raise Forbidden("a tensor changed its shape")
                return tensor
            at = inner.untyped_storage().data_ptr()
            if at and tensor.held.untyped_storage().data_ptr() == at:
                return DeviceTensor(inner, place, tensor.block)
        fresh.append(inner)
        return self.put(inner, place)

    def _copied(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], asked: torch.device | None) -> Any:
        bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        late = bool(bound.get("non_blocking"))
        if name == "copy_":
            to, source = bound["self"], bound["src"]
            self._move(source, to, late)
            return to
        source = bound["self"]
        assert asked is not None
        if asked.type == "cuda":
            asked = torch.device("cuda", self.gpu_of(asked).index)
        dtype = bound.get("dtype") or source.dtype
        if source.device == asked and dtype == source.dtype and not bound.get("copy") and name == "to":
            return source
        inner = torch.empty_like(getattr(source, "held", source), dtype=dtype)
        out = inner if asked.type == "cpu" else self.put(inner, asked)
        self._move(source, out, late)
        return out

    def _move(self, source: torch.Tensor, to: torch.Tensor, late: bool) -> None:
        if isinstance(source, DeviceTensor) and isinstance(to, DeviceTensor):
            gpu, a, b = self.gpu_of(to.device), to.held, source.held
            if gpu.graph is None:
                a.copy_(b)
            else:
                gpu.graph.add(lambda: a.copy_(b) and None, [source, to])
            return
        there, host = (to, source) if isinstance(to, DeviceTensor) else (source, to)
        assert isinstance(there, DeviceTensor)
        gpu = self.gpu_of(there.device)
        if gpu.graph is not None:
            raise Forbidden("a recording copies from or to the host")
        pinned = late and host.untyped_storage().data_ptr() in self.pinned
        if there is to:
            there.held.copy_(host)
            if pinned:
                gpu.add(Late(host, None, checksum(host)))
        elif pinned:
            gpu.add(Late(host, there.held.to(host.dtype, copy=True), 0))
            poison(host)
        else:
            with torch.inference_mode():
                host.copy_(there.held)
        if not pinned:
            self.wait(gpu, f"a copy {'to' if there is to else 'from'} the device")

    def launched(self, own: Callable[..., None], kernel: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A kernel of Triton, in its interpreter."""
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        if not any(isinstance(x, DeviceTensor) for x in given):
            own(kernel, *args, **kwargs)
            return
        if any(not isinstance(x, DeviceTensor) or x.device.index != self.index for x in given):
            raise Forbidden(f"a kernel on cuda:{self.index} is given {given}")
        inner, named = tree_map_only(DeviceTensor, lambda x: x.held, (args, kwargs))
        graph = self._recording(None)
        if graph is None:
            own(kernel, *inner, **named)
        else:
            graph.add(lambda: own(kernel, *inner, **named), given)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The first argument that an operation writes, which it returns."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found = args[i] if i < len(args) else kwargs[argument.name]
            return found[0] if isinstance(found, (list, tuple)) else found
    raise AssertionError(func)


def _again(func: Any, args: Any, kwargs: dict[str, Any], made: Any) -> None:
    for old, new in zip(tree_flatten(made)[0], tree_flatten(func(*args, **kwargs))[0], strict=True):
        if isinstance(old, torch.Tensor):
            old.copy_(new)


class SideStream(Stream):
    """A stream beside the device's own. Nothing here waits for one, so work there is refused outside of recordings."""


@contextlib.contextmanager
def _use(stream: Stream) -> Iterator[None]:
    """See torch.cuda.stream."""
    device = current()
    device.stream = stream
    try:
        yield
    finally:
        device.stream = None  # also where the block is left only when the stand-in is gone


def _properties(gpu: Gpu) -> SimpleNamespace:
    name, uuid = "Stand-in", f"00000000-0000-0000-0000-{gpu.index:012d}"
    return SimpleNamespace(
        name=name, uuid=uuid, total_memory=gpu.total_bytes, multi_processor_count=4, major=9, minor=0
    )


def _exchanges(patch: pytest.MonkeyPatch) -> None:
    """What goes between GPUs by NCCL goes between their stand-ins by gloo, as part of a graph or at once."""
    start, reduce, gather = dist.init_process_group, dist.all_reduce, dist.gather

    def started(backend: str, **options: Any) -> None:
        assert backend == "cpu:gloo,cuda:nccl"
        start("gloo", **options)

    def done(own: Callable[..., object], first: torch.Tensor, *rest: Any, **named: Any) -> None:
        given = [x for x in tree_flatten((first, rest))[0] if isinstance(x, DeviceTensor)]
        args = tree_map_only(DeviceTensor, lambda x: x.held, (first, *rest))
        if any(x.device.index != current().index for x in given):
            raise Forbidden("an exchange of another device than the thread's own")
        if any(not x.is_contiguous() for x in given):
            raise Forbidden("an exchange of a tensor that is not contiguous")
        graph = current().here.graph if given else None
        if graph is None:
            alike(given, 0)
            own(*args, **named)
        else:
            graph.add(lambda: alike(given, 1) or (own(*args, **named) and None), given)

    def alike(given: list[Any], recorded: int) -> None:
        """NCCL: whether an exchange is part of a graph must be the same for all ranks."""
        if not given:
            return
        ranks = torch.tensor(recorded)
        reduce(ranks)
        if int(ranks) not in (0, dist.get_world_size()):
            raise Forbidden("an exchange is part of a graph at some ranks only")

    patch.setattr(dist, "init_process_group", started)
    patch.setattr(dist, "all_reduce", partial(done, reduce))
    patch.setattr(dist, "gather", partial(done, gather))


def install(patch: pytest.MonkeyPatch, gpus: int = 1, total_bytes: int = 1 << 30) -> StandIn:
    """Until the patch is undone this process has GPUs. The thread's operations go there within `with` of what comes."""
    mode = StandIn(gpus, total_bytes)
    patch.setattr(cuda_tensors, "_now", [mode])

    def of(read: Callable[[Gpu], Any]) -> Callable[..., Any]:
        return lambda place=None: read(mode.gpu_of(place))

    def set_device(place: Any) -> None:
        mode.index = mode.gpu_of(place).index

    def empty_cache() -> None:
        for gpu in mode.gpus:
            gpu.reserved = gpu.allocated

    def reset_peak(gpu: Gpu) -> None:
        gpu.peak = gpu.reserved

    def set_stream(stream: Stream) -> None:
        mode.stream = stream if isinstance(stream, SideStream) else None

    for name, value in {
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "get_arch_list": lambda: ["sm_90"],
        "set_stream": set_stream,
        "is_available": lambda: True,
        "device_count": lambda: gpus,
        "current_device": lambda: mode.index,
        "set_device": set_device,
        "get_device_name": of(lambda gpu: "Stand-in"),
        "get_device_capability": of(lambda gpu: (9, 0)),
        "get_device_properties": of(_properties),
        "mem_get_info": of(lambda gpu: (gpu.total_bytes - gpu.held_bytes - gpu.reserved, gpu.total_bytes)),
        "memory_allocated": of(lambda gpu: gpu.allocated),
        "memory_reserved": of(lambda gpu: gpu.reserved),
        "max_memory_reserved": of(lambda gpu: gpu.peak),
        "reset_peak_memory_stats": of(reset_peak),
        "synchronize": of(Gpu.wait),
        "empty_cache": empty_cache,
        "current_stream": of(Stream),
        "Stream": SideStream,
        "stream": _use,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.cuda.graph, "default_capture_stream", None)
    patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    torch._C._ensureCUDADeviceGuardSet()
    tensor = torch.tensor

    def made(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        values = tensor(data, **options)
        return values if device is None else values.to(device)

    patch.setattr(torch, "tensor", made)
    patch.setattr(load, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(n, initializer=mode.begin_thread))
    patch.setattr(convert, "_CHUNK_BYTES", 1 << 12)
    patch.setattr(device, "gpu_of", lambda place: launch.H200)
    patch.setattr(launch, "gpu_of", lambda place: launch.H200)
    patch.setenv(launch.AHEAD, "0")
    _exchanges(patch)
    launch._counters.cache_clear()
    own = interpreter.GridExecutor.__call__
    patch.setattr(interpreter.GridExecutor, "__call__", lambda self, *a, **k: mode.launched(own, self, a, k))
    return mode
