"""Reads what the user gave a command (arguments, environment, --config FILE) and shows where each value is from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.errors import ConfigError
from pagoda.options.config import declared
from pagoda.options.resolve import Settings, resolve


@dataclass(frozen=True, slots=True)
class Inputs:
    """The arguments without those that belong to the command line itself."""

    argv: list[str]
    config: str | None
    show_config: bool
    help: str | None
    """None: not asked for; '' or 'all': everything; else a word to look for."""


def split(argv: Sequence[str]) -> Inputs:
    """Take out --config, --show-config and --help."""
    rest: list[str] = []
    config, show, help_word = None, False, None
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in ("-h", "--help"):
            help_word = value
        elif name == "--show-config":
            show = True
        elif name == "--config":
            if not equals and (not words or words[0].startswith("-")):
                raise ConfigError("--config needs a file", remedy="Write --config FILE (JSON or YAML)")
            config = value if equals else words.pop(0)
        else:
            rest.append(word)
    return Inputs(rest, config, show, help_word)


def load(inputs: Inputs, environ: Mapping[str, str]) -> Settings:
    """The options of a command, from all sources."""
    config = inputs.config or environ.get("PAGODA_CONFIG")
    file = (config, read_config(config)) if config else None
    return resolve(inputs.argv, environ, file)


def read_config(path: str) -> Mapping[str, Any]:
    """The content of a JSON or YAML file whose keys are option names."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(
            f"The config file {path} cannot be read: {error.strerror}", remedy="Look at --config FILE"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"The config file {path} is not text in UTF-8") from None
    content = _parse_json(path, text) if text.lstrip().startswith("{") else _parse_yaml(path, text)
    if content is None:
        return {}
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"The config file {path} is not a table of options", remedy="Write lines such as port: 8000")
    return content


def _parse_json(path: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if path.endswith((".yaml", ".yml")):
            return _parse_yaml(path, text)
        raise ConfigError(f"The config file {path} is not JSON: line {error.lineno}: {error.msg}") from None


def _parse_yaml(path: str, text: str) -> Any:
    import yaml  # only a server with a YAML file pays for it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise ConfigError(f"The config file {path} is not YAML: see line {line}") from None


def show(settings: Settings) -> str:
    """Each option, its value and its origin; keys are masked."""
    rows = []
    for setting in declared():
        value = getattr(settings.options, setting.name)
        text = "-" if value in (None, (), {}, "") else "***" if setting.secret else _plain(value)
        rows.append((setting.name.replace("_", "-"), text, settings.origins[setting.name]))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(each if isinstance(each, str) else json.dumps(each) for each in value)
    return json.dumps(value) if isinstance(value, bool | Mapping) else str(value)
