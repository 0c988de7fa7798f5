"""An engine process that kills itself, as `kill -9` does, when it is to begin its STEPS-th step: `STEPS FD`."""

from __future__ import annotations

import os
import signal
import sys

from pagoda.engine.core import EngineCore
from pagoda.engine.process import main
from pagoda.types import Delta


class Dying(EngineCore):
    def begin(self) -> list[Delta]:
        if self.stats().steps == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().begin()


if __name__ == "__main__":
    sys.exit(main([sys.argv[0], sys.argv[2]], Dying))
