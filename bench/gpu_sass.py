"""What a compiled kernel does, read from its machine code: how wide it loads, on which units, how many fit a GPU."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
REGISTERS = 1 << 16
THREADS = {86: 1536, 89: 1536, 120: 1536}
"""Of a multiprocessor, where it is not 2,048."""
MOST_BLOCKS = {86: 16, 89: 24, 120: 24}
RESERVED_BYTES = 1 << 10
"""Of shared memory, for each program."""
_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]\s+)?([A-Z][\w.]*)([^;]*);|^(\.L\w+):", re.M)
_MATRIX = re.compile(r"(?:U?[HIQO]G?MMA|UTC\w+MMA)")
Instruction = tuple[str, str]


def taken_apart(cubin: bytes, folder: Path) -> tuple[str, str]:
    """Machine code with its labels, and a line of what it takes."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    commands = [TOOLS / "nvdisasm", "-c", file], [TOOLS / "cuobjdump", "--dump-resource-usage", file]
    code, usage = (subprocess.run(each, capture_output=True, text=True, check=True).stdout for each in commands)
    return code, usage


def facts(cubin: bytes, folder: Path) -> dict[str, Any]:
    """`registers` of a thread; `stack` bytes of it; `local`: loads and stores of spilled values; `matrix`: the matrix
    instructions; `loads`: bytes of one load: how many loads so wide there are in loops (where no loop has any: in all)
    from the GPU's memory; `ahead`: how many of them go to shared memory while the program goes on."""
    code, usage = taken_apart(cubin, folder)
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    everything, looped = _instructions(code)
    from_memory = [each for each in looped if _is_load(each)] or [each for each in everything if _is_load(each)]
    matrix = Counter(name.split(".")[0] for name, _ in everything if _MATRIX.match(name))
    return {
        "registers": int(used["REG"]),
        "stack": int(used["STACK"]),
        "local": sum(name.split(".")[0] in ("LDL", "STL") for name, _ in everything),
        "matrix": dict(matrix),
        "loads": dict(sorted(Counter(_nbytes(name) for name, _ in from_memory).items(), reverse=True)),
        "ahead": sum(name.startswith("LDGSTS") for name, _ in from_memory),
    }


def _instructions(code: str) -> tuple[list[Instruction], list[Instruction]]:
    """All instructions, and those within a loop."""
    lines: list[Instruction] = []
    labels: dict[str, int] = {}
    for found in _LINE.finditer(code):
        if found[3]:
            labels[found[3]] = len(lines)
        else:
            lines.append((found[1], found[2]))
    inside: set[int] = set()
    for end, (name, operands) in enumerate(lines):
        target = re.search(r"\((\.L\w+)\)", operands) if name.startswith("BRA") else None
        if target and labels.get(target[1], end) < end:
            inside.update(range(labels[target[1]], end))
    return lines, [lines[i] for i in sorted(inside)]


def _is_load(each: Instruction) -> bool:
    return each[0].split(".")[0] in ("LDG", "LDGSTS")


def _nbytes(name: str) -> int:
    parts = name.split(".")
    return next((n for part, n in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1)) if part in parts), 4)


def programs(number: int, shared_bytes: int, registers: int, shared: int, warps: int) -> int:
    """Programs that are on a multiprocessor at once. Registers go by eight, for each warp."""
    threads = 32 * warps
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = (shared_bytes + RESERVED_BYTES) // (shared + RESERVED_BYTES)
    return min(MOST_BLOCKS.get(number, 32), THREADS.get(number, 2048) // threads, by_registers, by_shared)
