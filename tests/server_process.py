"""A server as a process of its own, for tests that see it through HTTP only. Imports nothing of Pagoda."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PYTHON = os.environ.get("PAGODA_PYTHON") or sys.executable


@contextmanager
def running(
    *command: str, announced: str = r"(http://\S+)/v1 answers now", environ: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A server's address, as it prints it when it is ready."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}",
        "PYTHONUNBUFFERED": "1",
        **(environ or {}),
    }
    process = subprocess.Popen(
        [PYTHON, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if found := re.search(announced, line):
                yield found[1].replace("localhost", "127.0.0.1")
                break
        else:
            pytest.fail("".join(said))
    finally:
        process.terminate()
        process.communicate(timeout=60)


def serve(*arguments: str) -> tuple[str, ...]:
    return "-m", "pagoda.cli.main", "serve", "--port", "0", *arguments
