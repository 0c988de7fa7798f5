"""`pagoda doctor`: is this machine fit to serve?"""

from __future__ import annotations

import os

from pagoda.cli.findings import only, show, take
from pagoda.errors import ConfigError

HELP = """\
Usage: pagoda doctor [options]

Looks at what serving needs of this machine: processor, memory, GPUs and who holds them, disk, port, proxy, open
files, clock, and whether the places that models come from answer. Each finding has its cure below it.
The exit code is 0, or 1 if something would stop serving.

Examples:
  pagoda doctor
  pagoda doctor --offline --port 8080

Options:
  --port N     the port that will be served (default 8000)
  --offline    ask nobody in the network
  --json       the findings for a program
"""


def run(words: list[str]) -> int:
    given, rest = take(words, ("offline", "json"), ("port",))
    if "help" in given:
        print(HELP, end="")
        return 0
    only(rest, 0, "doctor")
    port = given.get("port", "8000")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--port {port} is no port", remedy="Give a number from 1 to 65535")
    from pagoda.deploy.doctor import examine

    findings = examine(os.environ, port=int(port), offline="offline" in given)
    verdicts = ("Nothing here stops serving.", "{count} found that would stop serving.")
    return show(findings, verdicts, as_json="json" in given)
