"""Logs: one line per event, nothing forged, nothing of what people wrote."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_fake import Client, FakeEngine, make_server

from pagoda.observe import OneLine, printable, setup_logging


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """Logging as the server sets it up, into a file; taken back afterwards."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    root.handlers = []
    path = tmp_path / "logs" / "pagoda.log"
    setup_logging("info", str(path))
    yield path
    for handler in root.handlers:
        handler.close()
    root.handlers = before
    root.setLevel(level)


def test_one_line_per_event_with_controls_escaped(log_file: Path) -> None:
    logging.getLogger("pagoda.x").warning("a %s", "b\n2026-01-01 info forged\x1b[31m\u2028é")
    logging.getLogger("pagoda.x").debug("not shown")
    (line,) = log_file.read_text("utf-8").splitlines()
    assert line.endswith(r"warning a b\n2026-01-01 info forged\x1b[31m\u2028é")


def test_setting_up_twice_does_not_log_twice(log_file: Path) -> None:
    setup_logging("warning", str(log_file))
    logging.getLogger("pagoda.x").warning("once")
    logging.getLogger("pagoda.x").info("below the level")
    assert log_file.read_text("utf-8").count("\n") == 1


def test_printable_keeps_letters_of_all_languages() -> None:
    assert printable("你好, wörld\t🙂\x00\x85") == "你好, wörld\\t🙂\\x00\\x85"


def test_errors_keep_their_traceback() -> None:
    try:
        raise ValueError("x")
    except ValueError:
        record = logging.getLogger("t").makeRecord("t", logging.ERROR, "f", 1, "failed\n", (), None)
        record.exc_info = sys.exc_info()
    text = OneLine().format(record)
    assert "failed\\n" in text and "Traceback" in text


def test_a_request_is_one_line_without_its_text(log_file: Path) -> None:
    with Client(make_server(FakeEngine("secret answer"), log_requests=True)) as client:
        client.chat("secret question", max_tokens=5, **{"odd\nfield": 1})
        client.complete("secret question", n=2, max_tokens=3)
        client.chat("x" * 600)
    lines = [line for line in log_file.read_text("utf-8").splitlines() if "prompt=" in line]
    assert len(lines) == 2
    assert " fake-model 200 prompt=34 cached=4 completion=5 first_token=" in lines[0]
    assert lines[0].endswith("finish=length") and "ms total=" in lines[0]
    assert "prompt=15 cached=4 completion=6" in lines[1]
    assert "secret" not in log_file.read_text("utf-8")
    assert r"'odd\nfield'" in log_file.read_text("utf-8")
