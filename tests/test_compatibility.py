"""docs/compatibility.md: every requirement has its row, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "compatibility.md").read_text()
LINKS = sorted(set(re.findall(r"\[(test_\w+)\]\((\.\./tests/[\w/]+\.py)\)", PAGE)))


def exists(name: str, path: Path) -> bool:
    """`name` is the file itself, or a test in it."""
    return path.exists() and (name == path.stem or re.search(rf"^def {name}\(", path.read_text(), re.M) is not None)


@pytest.mark.parametrize(("name", "path"), LINKS)
def test_what_is_named_exists(name: str, path: str) -> None:
    assert exists(name, DOCS / path)


def test_a_test_that_is_gone_is_noticed() -> None:
    assert len(LINKS) > 80 and not exists("test_that_is_gone", Path(__file__)) and not exists("x", DOCS / "x.py")


def test_every_requirement_has_one_row_with_a_test() -> None:
    rows = re.findall(r"^\| (\d[\d, ]*) \|(.*)$", PAGE, re.M)
    numbers = [int(number) for keys, _ in rows for number in keys.split(",")]
    assert sorted(numbers) == list(range(1, 49))
    assert all("](../tests/" in rest for _, rest in rows)


def test_versions_are_those_that_are_installed() -> None:
    pinned = "".join(path.read_text() for path in (DOCS.parent / "tests" / "clients").glob("*.txt"))
    for package, version in re.findall(r"([a-z_-]+) (\d+\.\d+\.\d+)", PAGE.partition("## OpenAI")[0]):
        name = package.replace("_", "[-_]")
        assert re.search(rf"^{name}=={re.escape(version)}\b", pinned, re.M | re.I), f"{package} {version}"
