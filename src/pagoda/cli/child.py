"""`pagoda serve` as the child of a gateway: it ends when the gateway does, however that ended."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

from pagoda.cli.main import main

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # It may have ended before it was asked to take us with it: then nobody hears at its socket.
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.connect(os.environ["NOTIFY_SOCKET"])
        except OSError:
            sys.exit("the gateway is gone")
    sys.exit(main(["serve", *sys.argv[1:]]))
