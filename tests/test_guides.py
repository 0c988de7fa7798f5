"""docs/guides.md: each command is one that Pagoda has, with options that it takes, in both languages the same."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from pagoda.cli.inputs import load, split
from pagoda.cli.main import COMMANDS
from pagoda.options.config import declared
from pagoda.options.resolve import Settings

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("guides.md", "guides.zh-CN.md")
OPTIONS_OF_SERVE = ("serve", "plan", "service")


def blocks(page: str) -> list[str]:
    return re.findall(r"```(?:bash|python)\n(.*?)```", (DOCS / page).read_text(), re.S)


def commands(page: str) -> list[list[str]]:
    lines = [shlex.split(line) for block in blocks(page) for line in block.splitlines() if "pagoda " in line]
    return [words[words.index("pagoda") + 1 :] for words in lines if "pagoda" in words]


def own_options(command: str) -> set[str]:
    """The options that its --help lists."""
    return set(re.findall(r"--[a-z-]+", importlib.import_module(f"pagoda.cli.{command}").HELP))


@pytest.mark.parametrize("words", commands(PAGES[0]), ids=" ".join)
def test_options_are_known(words: list[str]) -> None:
    known = own_options(words[0]) if words[0] != "serve" else set()
    if words[0] in OPTIONS_OF_SERVE:
        known |= {setting.flag for setting in declared()}
    assert words[0] in COMMANDS
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("words", [w for w in commands(PAGES[0]) if w[0] == "serve"], ids=" ".join)
def test_serve_understands_its_values(words: list[str]) -> None:
    settings = load(split(words[1:]), {})
    assert isinstance(settings, Settings) and settings.options.model == words[1]


def test_both_languages_have_the_same_commands() -> None:
    assert blocks(PAGES[0]) == blocks(PAGES[1])
    assert len(commands(PAGES[0])) > 15
