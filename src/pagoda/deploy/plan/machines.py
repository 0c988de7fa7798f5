"""The machine that a plan is for: this one's memory, or GPUs as people name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pagoda.errors import ConfigError

_MIB, _GIB = 1 << 20, 1 << 30

_GPUS_MIB: Mapping[str, int] = MappingProxyType(
    {
        "b200": 183359, "h200": 143771, "h100": 81559, "h100-80": 81559, "h100-94": 95830, "h20": 97871, "a100": 81920,
        "a100-80": 81920, "a100-40": 40960, "a800": 81920, "h800": 81559, "l40s": 46068, "l40": 46068, "a40": 46068,
        "l20": 46068, "l4": 23034, "a10": 23028, "t4": 15360, "p100": 16384, "v100": 32768, "v100-32": 32768,
        "v100-16": 16384, "a6000": 49140, "6000-ada": 49140, "a5000": 24564, "a4000": 16376, "5090": 32607,
        "5080": 16303, "5070": 12227, "4090": 24564, "4090d": 24564, "4080": 16376, "4070": 12282, "4060": 8188,
        "4060ti-16": 16380, "3090": 24576, "3080": 10240, "3070": 8192, "3060": 12288, "2080ti": 11264,
    }
)  # fmt: skip
"""Memory as nvidia-smi reports it."""

_UNITS = MappingProxyType(
    {"": _GIB, "G": _GIB, "GI": _GIB, "GIB": _GIB, "GB": 10**9, "M": _MIB, "MI": _MIB, "MIB": _MIB, "MB": 10**6,
     "T": _GIB << 10, "TIB": _GIB << 10, "TB": 10**12}
)  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_MOST_GPUS = 1024


@dataclass(frozen=True, slots=True)
class Machine:
    """`memory_bytes` of each GPU; of a CPU, the memory that is free. `count` is the number of GPUs, 0 for a CPU."""

    name: str
    memory_bytes: int
    count: int = 0


def parse_memory(text: str, flag: str) -> int:
    """24GiB, 24G, 16384M or 24 (GiB) as bytes; GB and MB are powers of ten."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not 0 < float(match[1]) * unit < 1 << 50:
        raise ConfigError(f"{flag} {text}: this is no amount of memory", remedy=f"Write {flag} 24GiB")
    return int(float(match[1]) * unit)


def parse_gpus(text: str) -> Machine:
    """ "2x16GiB", "h200", "4x4090", "a100-80": number and size, or number and name."""
    match = re.fullmatch(r"(?:(\d{1,4})\s*[xX*]\s*)?(.+)", text.strip())
    count, what = (int(match[1] or 1), match[2].strip()) if match else (0, "")
    if not 1 <= count <= _MOST_GPUS:
        raise ConfigError(f"--gpu {text}: this is no number of GPUs", remedy='Write --gpu "2x16GiB" or --gpu h200')
    name = re.sub(r"^(nvidia|geforce|rtx|tesla|quadro)[-_ ]*", "", _plain(what))
    name = re.sub(r"^(nvidia|geforce|rtx|tesla|quadro)[-_ ]*", "", name).removesuffix("gb").removesuffix("-")
    if name in _GPUS_MIB:
        return Machine(f"{count} x {name.upper()}" if count > 1 else name.upper(), _GPUS_MIB[name] * _MIB, count)
    if not _SIZE.fullmatch(what) or not _SIZE.fullmatch(what)[2]:  # type: ignore[index]
        raise ConfigError(
            f"--gpu {text}: this GPU is not known",
            remedy=f'Write its memory: --gpu "24GiB". Known: {", ".join(_GPUS_MIB)}',
        )
    each = parse_memory(what, "--gpu")
    return Machine(f"{count} GPUs" if count > 1 else "1 GPU", each, count)


def _plain(text: str) -> str:
    return re.sub(r"[\s_]+", "-", text.lower())
