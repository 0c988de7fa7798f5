"""`pagoda serve` as the child of a gateway: it ends when the gateway does, however that ended."""

from __future__ import annotations

import ctypes
import signal
import sys

from pagoda.cli.main import main

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    sys.exit(main(["serve", *sys.argv[1:]]))
