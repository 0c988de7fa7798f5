"""Runs functions for at most so many seconds each, and stops one where it is if it takes longer."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_DELIVERY_S = 1.0


class DeadlineExceeded(Exception):
    """The function was stopped, because its time was over."""


class _Expired(BaseException):
    """Raised inside the function; not an Exception, so that nothing in it takes it for its own."""


class Deadline:
    """One limit for all functions that are run under it, in whatever thread.

    A single thread watches them, because starting one for each call would cost more than most calls take: it is there
    from the first call until the time of the last one is over.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._begun: deque[tuple[float, list[bool], int]] = deque()  # ends in this order, as all have one limit
        self._watched = False

    def run(self, work: Callable[[], T]) -> T:
        """The function's result, or DeadlineExceeded. It runs in this thread; only Python code can be stopped.

        Who takes the one ticket decides the race at the end: the watcher, then the exception is coming and is waited
        for here, or this thread, then the watcher lets it be. So no exception arrives after the return.
        """
        ticket = [True]
        error: Exception | None = None
        try:
            self._watch(ticket)
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
            raise DeadlineExceeded(f"stopped after {self._seconds:g} s") from None
        finally:
            _take(ticket)
        if error is not None:
            raise error
        return result

    def _watch(self, ticket: list[bool]) -> None:
        with self._lock:
            self._begun.append((time.monotonic() + self._seconds, ticket, threading.get_ident()))
            if self._watched:
                return
            self._watched = True
        threading.Thread(target=self._stop_the_late, name="deadline", daemon=True).start()

    def _stop_the_late(self) -> None:
        while True:
            with self._lock:
                if not self._begun:
                    self._watched = False
                    return
                end, ticket, thread_id = self._begun.popleft()
            if ticket:
                time.sleep(max(0.0, end - time.monotonic()))
                _expire(ticket, thread_id)


def _take(ticket: list[bool]) -> bool:
    try:
        return ticket.pop()
    except IndexError:
        return False


def _expire(ticket: list[bool], thread_id: int) -> None:
    if _take(ticket):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(_Expired))
