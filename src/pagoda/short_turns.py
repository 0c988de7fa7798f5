"""Short turns on the processor, for a process that must answer at once beside others that compute without a pause."""

from __future__ import annotations

import ctypes
import os
import sys

_SYSTEM_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr, sched_getattr
_USUAL, _RESET_ON_FORK = 0, 1
_TURN_NS = 100_000


class _Attributes(ctypes.Structure):
    """The kernel's struct sched_attr, first version."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("turn_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    ]


def turn_ns() -> int | None:
    """The length that this thread asks for; None where the system does not say."""
    attributes = _read()
    return None if attributes is None else int(attributes.turn_ns)


def take() -> None:
    """Ask for short turns, for this thread and no child of it: Linux 6.12 lets who asks for them in as he wakes up.

    Elsewhere it changes nothing. A thread of the engine would otherwise go on for up to 4 ms, with a token waiting.
    """
    attributes = _read()
    if attributes is not None and attributes.policy == _USUAL:
        attributes.turn_ns, attributes.flags = _TURN_NS, _RESET_ON_FORK
        _call(0, 0, ctypes.byref(attributes), 0)


def _read() -> _Attributes | None:
    attributes = _Attributes()
    done = _call(1, 0, ctypes.byref(attributes), ctypes.sizeof(attributes), 0)
    return attributes if done else None


def _call(number: int, *arguments: object) -> bool:
    numbers = _SYSTEM_CALLS.get(os.uname().machine) if sys.platform == "linux" else None
    return numbers is not None and ctypes.CDLL(None).syscall(numbers[number], *arguments) == 0
