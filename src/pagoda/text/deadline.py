"""Runs a function for at most so many seconds, and stops it where it is if it takes longer."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_DELIVERY_S = 1.0


class DeadlineExceeded(Exception):
    """The function was stopped, because its time was over."""


class _Expired(BaseException):
    """Raised inside the function; not an Exception, so that nothing in it takes it for its own."""


def run_with_deadline(work: Callable[[], T], seconds: float) -> T:
    """The function's result, or DeadlineExceeded. It runs in this thread; only Python code can be stopped.

    Who takes the one ticket decides the race at the end: the timer, then the exception is coming and is waited
    for here, or this thread, then the timer never fires. So no exception arrives after the return.
    """
    ticket = [True]
    timer = threading.Timer(seconds, _expire, (ticket, threading.get_ident()))
    timer.daemon = True
    error: Exception | None = None
    try:
        timer.start()
        try:
            result = work()
        except Exception as e:
            error = e
        if not _take(ticket):
            end = time.monotonic() + _DELIVERY_S
            while time.monotonic() < end:
                time.sleep(0.001)
            raise _Expired  # it was delivered where the interpreter swallows exceptions, such as a destructor
    except _Expired:
        raise DeadlineExceeded(f"stopped after {seconds:g} s") from None
    finally:
        _take(ticket)
        timer.cancel()
    if error is not None:
        raise error
    return result


def _take(ticket: list[bool]) -> bool:
    try:
        return ticket.pop()
    except IndexError:
        return False


def _expire(ticket: list[bool], thread_id: int) -> None:
    if _take(ticket):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(_Expired))
