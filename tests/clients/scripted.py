"""A server on a free port whose model thinks, speaks and calls two tools, which no model this small does by itself."""

from __future__ import annotations

import signal
import threading

from api_fake import on_port
from test_ollama_answers import thinker

stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
server, engine = thinker()
with on_port(server, engine) as url:
    print(url, flush=True)
    stop.wait()
