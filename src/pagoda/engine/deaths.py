"""How often the engine died of late, and how long to wait before it is started again."""

from __future__ import annotations

import time
from collections import deque

WINDOW_S = 600.0
_LONGEST_WAIT_S = 30.0


class Deaths:
    """Those of the last ten minutes."""

    def __init__(self, backoff_s: float) -> None:
        self._backoff_s = backoff_s
        self._times: deque[float] = deque()

    def __len__(self) -> int:
        return len(self._times)

    def count(self) -> None:
        now = time.monotonic()
        self._times.append(now)
        while now - self._times[0] > WINDOW_S:
            self._times.popleft()

    @property
    def wait_s(self) -> float:
        """0, 1, 2, 4 ... 30 seconds."""
        deaths = len(self)
        return 0.0 if deaths < 2 else min(_LONGEST_WAIT_S, self._backoff_s * 2.0 ** (deaths - 2))
