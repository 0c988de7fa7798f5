"""The device that computes: which one, in which type of floats, and how much of its memory is there for us."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import psutil
import torch

from pagoda.arch.memory import DEFAULT_SHARE, size_text
from pagoda.backend.cpu.machine import free_memory_bytes
from pagoda.backend.torch.kernels.launch import gpu_of
from pagoda.backend.torch.toolchain import lacking, use_writable_cache
from pagoda.errors import ConfigError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
)
_FP8_CAPABILITY, _BF16_CAPABILITY = (8, 9), (8, 0)
_QUERY_TIMEOUT_S = 10
_MIB = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    device: torch.device
    name: str
    capability: tuple[int, int] | None  # None: a CPU

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def fp8(self) -> bool:
        """Products of FP8 matrices run here."""
        return self.capability is None or self.capability >= _FP8_CAPABILITY


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of a device: `used_bytes` of `total_bytes` are held already, by others and by the driver."""

    total_bytes: int
    used_bytes: int
    used_by: str
    share: float


def no_gpu() -> str:
    """Why PyTorch computes on no GPU here; nothing where it does."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # says why: no driver, one too old, ...
    except RuntimeError as error:
        return f"PyTorch finds no GPU: {_short(error)}"
    return "PyTorch finds no GPU"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def open_device(cuda: bool) -> Device:
    """The current GPU, or the CPU. Raises ConfigError where there is no GPU, or none to compile for it."""
    if not cuda:
        return Device(torch.device("cpu"), "PyTorch on the CPU", None)
    if why := no_gpu():
        cure = "Use --device cpu" + (", or install a PyTorch with CUDA" if torch.version.cuda is None else "")
        raise ConfigError(f"--device cuda: {why}", remedy=cure, param="device")
    index = torch.cuda.current_device()
    device = torch.device("cuda", index)
    found = Device(device, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
    _try(found)
    _ready_to_compile(device)
    return found


def _try(found: Device) -> None:
    """Raises ConfigError for a GPU that is there and does not compute: of a generation that this PyTorch does not know,
    taken by one process alone, broken."""
    try:
        torch.zeros(8, device=found.device).add_(1).sum().item()
    except torch.OutOfMemoryError:
        return  # how much there is, and who has it, is said when it is asked for
    except RuntimeError as error:
        raise ConfigError(
            f"--device cuda: {found.name} does not compute: {_short(error)}",
            remedy=f"See `nvidia-smi`; this PyTorch is made for {', '.join(torch.cuda.get_arch_list())}: where the GPU "
            "is another, install one that is made for it. Or use --device cpu",
            param="device",
        ) from error


def _ready_to_compile(device: torch.device) -> None:
    """Raises ConfigError where Triton could not compile, and has not done so before."""
    _log.debug("compiled kernels are kept in %s", use_writable_cache(os.environ))
    error = lacking(os.environ)
    if error is None:
        return
    try:
        gpu_of(device)  # the first that is compiled
    except Exception:
        raise error from None
    _log.warning("%s; what was compiled before is used", error)


def choose_dtype(asked: str, config: Mapping[str, Any], device: Device) -> torch.dtype:
    """`auto` is the type that the model was made in, where that is one of 16 bits and the GPU has it.

    The CPU, which is here for tests, takes float32.
    """
    old = device.capability is not None and device.capability < _BF16_CAPABILITY
    if asked == "bfloat16" and old:
        raise ConfigError(f"--dtype bfloat16: {device.name} has no bfloat16", remedy="Use --dtype float16")
    if asked in DTYPES:
        return DTYPES[asked]
    if not device.is_gpu:
        return torch.float32
    made_in = str(config.get("dtype") or config.get("torch_dtype"))
    return torch.float16 if old or made_in == "float16" else torch.bfloat16


def room(device: Device, share: float | None) -> Room:
    """What may be used: of a GPU a share of all it has, less what is held; of a CPU a share of what is free."""
    share = DEFAULT_SHARE if share is None else share
    if not device.is_gpu:
        return Room(free_memory_bytes(), 0, "", share)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device.device)
    used = total - free  # a draft model of this process counts too
    return Room(total, used, f"{size_text(used)} are held by {holders(_uuid(device))}", share)


def held_outside(device: Device) -> int:
    """Bytes of a GPU that are held, by others or by what this process uses beside PyTorch: NCCL, programs, graphs."""
    free, total = torch.cuda.mem_get_info(device.device)
    return total - free - torch.cuda.memory_reserved(device.device)


def _uuid(device: Device) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device.device).uuid}"


def holders(uuid: str) -> str:
    """The processes on a GPU, by name, as far as they can be seen; the driver's own part is always there."""
    program = shutil.which("nvidia-smi")
    lines: list[str] = []
    if program:
        query = [program, "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            lines = []
    return ", ".join([*_named(lines, uuid), "the driver"])


def _named(lines: list[str], uuid: str) -> list[str]:
    """From rows `uuid, pid, MiB` of one GPU to texts; this process is left out."""
    found = []
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[0] == uuid and cells[1].isdigit() and int(cells[1]) != psutil.Process().pid:
            held = f", {size_text(int(cells[2]) * _MIB)}" if cells[2].isdigit() else ""
            found.append(f"{_process_name(int(cells[1]))} (process {cells[1]}{held})")
    return found


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "a process of another user or container"
