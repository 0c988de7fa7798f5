"""`pagoda doctor`: what on this machine would stop or slow serving, each with its cure."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from pagoda.arch.memory import size_text
from pagoda.backend.cpu.library import Native
from pagoda.backend.cpu.machine import free_memory_bytes, usable_cores
from pagoda.backend.torch import toolchain
from pagoda.deploy import probe
from pagoda.deploy.download.default_model import cache_dir
from pagoda.deploy.findings import Finding, note, of_error, ok, problem
from pagoda.errors import PagodaError

TIMEOUT_S = 2.0
_SMALL_BYTES, _LEAST_BYTES = 2 << 30, 512 << 20
_SMALL_DISK_BYTES, _LEAST_DISK_BYTES = 5 << 30, 200 << 20
_MANY_FILES, _FEW_FILES = 4096, 256
_FIRST_SANE_S = 1_735_689_600  # 2025: Pagoda is younger
_SKEW_S = 300
_JUMP_S = 1.0
_GPU_HELD_MIB = 512
_LOOPBACK = ("localhost", "127.0.0.1")
_PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def examine(environ: Mapping[str, str], *, port: int = 8000, offline: bool = False) -> list[Finding]:
    """All findings about this machine."""
    return [
        *cpu(),
        *memory(free_memory_bytes(), int(psutil.virtual_memory().total)),
        *gpus(probe.nvidia_gpus(), has_device=probe.has_nvidia_device()),
        *(compiling(environ) if probe.has_nvidia_device() else ()),
        *storage(environ),
        *listening(port, probe.port_owner(port)),
        *proxies(environ),
        *open_files(resource.getrlimit(resource.RLIMIT_NOFILE)),
        *(
            [note("system", "WSL: it gets half of Windows' memory unless told otherwise", _WSL)]
            if probe.is_wsl()
            else []
        ),
        *clock(time.time(), probe.clock_drift()),
        *([] if offline else network(probe.ask(places(environ), TIMEOUT_S))),
    ]


_WSL = "Set memory= in %UserProfile%\\.wslconfig, and keep models in the Linux file system, not below /mnt"


def cpu() -> Iterator[Finding]:
    """Whether the native library runs here, with which instructions and how many threads."""
    name, features = probe.cpu_name_and_features()
    try:
        native = Native(1)
    except (PagodaError, OSError) as error:
        known = (
            error if isinstance(error, PagodaError) else PagodaError(f"the native library cannot be loaded: {error}")
        )
        yield of_error("cpu", known)
        return
    isa = native.isa
    native.close()
    has = f" (it has {', '.join(features)})" if features else ""
    yield ok("cpu", f"{name or 'processor'}: {isa} kernels{has}")
    cores, seen = usable_cores(), os.cpu_count() or 1
    text = f"{cores} threads, of {seen} processors in the machine"
    if cores * 4 <= seen:
        yield note("cpu", text, "A container's quota or taskset holds the others back: see docker run --cpus")
    else:
        yield ok("cpu", text)


def memory(free: int, total: int) -> Iterator[Finding]:
    text = f"{size_text(free)} free of {size_text(total)}"
    if free < _LEAST_BYTES:
        yield problem("memory", text, "End what holds it: ps aux --sort=-rss | head")
    elif free < _SMALL_BYTES:
        yield note("memory", text, "Small models only; what fits says: pagoda plan MODEL")
    else:
        yield ok("memory", text)


def gpus(found: probe.Gpus, *, has_device: bool) -> Iterator[Finding]:
    """A GPU that does not work stops nobody: models run on the CPU."""
    if found.error:
        cure = "Load the driver again: sudo modprobe nvidia, or restart; after an update of the driver restart"
        yield note("gpu", f"nvidia-smi fails: {found.error}", cure)
    elif not found.gpus and has_device:
        yield note("gpu", "there is an NVIDIA GPU and no nvidia-smi", "Install the driver; in a container: --gpus all")
    elif not found.gpus:
        yield ok("gpu", "none, models run on the CPU")
    for gpu in found.gpus:
        what = f"{gpu.index}: {gpu.name}, {gpu.used_mib} of {gpu.total_mib} MiB in use, driver {gpu.driver}"
        text = what + (f", CUDA up to {found.cuda}" if found.cuda else "")
        if gpu.used_mib < _GPU_HELD_MIB:
            yield ok("gpu", text)
            continue
        held = ", ".join(f"{name} (process {pid}, {mib} MiB)" for pid, name, mib in gpu.holders)
        cure = f"End it: kill {gpu.holders[0][0]}" if gpu.holders else "See who: sudo fuser -v /dev/nvidia*"
        cure += f"; or use another GPU with CUDA_VISIBLE_DEVICES, or a share below {_share(gpu):.2f}"
        yield note("gpu", f"{text}; held by {held or 'processes that are not shown'}", cure)


def compiling(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What the kernels of a GPU are compiled with, when they first run."""
    if error := toolchain.lacking(environ):
        yield note("gpu", error.message, error.remedy)
    else:
        yield ok("gpu", "a C compiler and Python's headers are there: kernels can be compiled")


def _share(gpu: probe.Gpu) -> float:
    return (gpu.total_mib - gpu.used_mib) / gpu.total_mib if gpu.total_mib else 0.0


def storage(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The caches: may they be written, and is there room."""
    try:
        own = cache_dir()
    except PagodaError as error:
        yield of_error("disk", error)
        return
    caches = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    shared = Path(environ.get("HF_HOME") or f"{caches}/huggingface").expanduser()
    for folder, variable in ((own, "PAGODA_CACHE"), (shared, "HF_HOME")):
        if not probe.writable(folder):
            cure = f'Allow it: sudo chown -R "$USER" {folder}   or set {variable} to a folder of yours'
            yield problem("disk", f"{folder} may not be written by this user", cure)
    # Two findings only where the caches are on two disks.
    for folder in {place.stat().st_dev: place for place in map(_existing, (shared, own))}.values():
        yield _room(folder)


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{size_text(free)} free at {folder}"
    if free < _LEAST_DISK_BYTES:
        return problem("disk", text, "Make room, or set HF_HOME and PAGODA_CACHE to folders on another disk")
    if free < _SMALL_DISK_BYTES:
        return note("disk", text, "Make room before you fetch a larger model")
    return ok("disk", text)


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def listening(port: int, owner: str | None) -> Iterator[Finding]:
    if owner is None:
        yield ok("port", f"{port} is free")
    else:
        yield problem(
            "port", f"{port} is taken{f' by {owner}' if owner else ''}", f"Use another one: --port {port + 1}"
        )


def proxies(environ: Mapping[str, str]) -> Iterator[Finding]:
    """A proxy for http:// that is not told to leave this machine out breaks clients here: they get its 502 or 503."""
    name = next((name for name in _PROXIES if environ.get(name)), None)
    if name is None:
        return
    exempt = f"{environ.get('no_proxy', '')},{environ.get('NO_PROXY', '')}".replace(" ", "").split(",")
    missing = [host for host in _LOOPBACK if host not in exempt and "*" not in exempt]
    if missing:
        cure = "export NO_PROXY=localhost,127.0.0.1,::1 no_proxy=localhost,127.0.0.1,::1"
        yield note(
            "proxy", f"{name} is set, and NO_PROXY lacks {' and '.join(missing)}: clients here ask the proxy", cure
        )
    else:
        yield ok("proxy", f"{name} is set, and NO_PROXY leaves this machine out")


def open_files(limits: tuple[int, int]) -> Iterator[Finding]:
    """The hard limit counts: the server takes what it may have."""
    most = limits[1]
    text = "no limit of open files" if most == resource.RLIM_INFINITY else f"{most} open files allowed"
    cure = "Raise it: as root ulimit -Hn 65536, for good in /etc/security/limits.conf; in a unit LimitNOFILE=65536"
    if most == resource.RLIM_INFINITY or most >= _MANY_FILES:
        yield ok("files", text)
    else:
        yield (problem if most < _FEW_FILES else note)("files", f"{text}: each client needs one", cure)


def clock(now_s: float, drift_s: float) -> Iterator[Finding]:
    cure = "Set it: sudo timedatectl set-ntp true"
    if now_s < _FIRST_SANE_S:
        date = time.strftime("%Y-%m-%d", time.gmtime(now_s))
        yield problem("clock", f"it says {date}: certificates will look as if they were not valid yet", cure)
    elif abs(drift_s) > _JUMP_S:
        yield note("clock", f"it moved by {drift_s:+.1f} s within a moment", cure)
    else:
        yield ok("clock", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s)))


def places(environ: Mapping[str, str]) -> dict[str, str]:
    """What downloads come from, by name."""
    found = {"Hugging Face": "https://huggingface.co"}
    if mirror := environ.get("HF_ENDPOINT", "").rstrip("/"):
        found |= {"HF_ENDPOINT": mirror if "://" in mirror else f"https://{mirror}"}
    found["ModelScope"] = environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    index = environ.get("PIP_INDEX_URL") or environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"
    return {**found, "Python packages": index.rstrip("/") + "/"}


def network(answers: Sequence[probe.Answer]) -> Iterator[Finding]:
    """Which sources answer. None of them is needed for a model that is here."""
    for answer in answers:
        if answer.reached:
            yield ok("network", f"{answer.name}: {_host(answer.url)} answers in {answer.time_s * 1000:.0f} ms")
        elif answer.certificate_error:
            cure = "Set the clock if it is wrong; behind a company's proxy set SSL_CERT_FILE to its certificate"
            yield note("network", f"{answer.name}: the certificate of {_host(answer.url)}: {answer.error}", cure)
        else:
            yield note("network", f"{answer.name}: {_host(answer.url)} does not answer: {answer.error}", _cure(answer))
    # The first that differs is told, with its name: a mirror nearby that agrees may share our clock.
    for answer in answers:
        if answer.skew_s is not None and abs(answer.skew_s) > _SKEW_S:
            way = "fast" if answer.skew_s > 0 else "slow"
            off = f"it is {abs(answer.skew_s) / 60:.0f} minutes {way}, by the clock of {_host(answer.url)}"
            yield note("clock", off, "Set it: sudo timedatectl set-ntp true")
            return


def _cure(answer: probe.Answer) -> str:
    if answer.name == "Hugging Face":
        return "Use a mirror: export HF_ENDPOINT=https://hf-mirror.com, or a proxy: export https_proxy=http://HOST:PORT"
    if answer.name == "Python packages":
        return "Use a mirror: export PIP_INDEX_URL=https://mirrors.aliyun.com/pypi/simple/"
    return "Check the address, the network and the proxy; models that are here can be served without it"


def _host(url: str) -> str:
    """The host alone: an index's address may hold a password."""
    return url.partition("://")[2].partition("/")[0].rpartition("@")[2]
