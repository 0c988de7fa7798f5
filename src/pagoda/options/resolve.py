"""From what the user gave (command line, environment, config file) to Options, with the origin of each value."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pagoda.errors import ConfigError
from pagoda.options.config import Options, declared
from pagoda.options.flags import not_yet, without_effect
from pagoda.options.setting import Setting
from pagoda.options.values import NUMBER, convert

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Given:
    """One value as the user gave it: `raw` is text, or what the config file held."""

    setting: Setting
    raw: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Settings:
    """The options, where each came from, and the lines to print at start."""

    options: Options
    origins: Mapping[str, str]
    notices: tuple[str, ...]


class Catalog:
    """All known settings, found by flag, alias, file key or variable."""

    def __init__(self) -> None:
        self.settings = {s.name: s for s in (*declared(), *without_effect(), *not_yet())}
        self._aliases = {alias: s for s in self.settings.values() for alias in s.aliases}

    def find(self, word: str) -> tuple[Setting, bool] | None:
        """The setting that a flag or key names, and False if it is the `--no-` form."""
        alias = "--" + word.lstrip("-").replace("_", "-")
        if word in self._aliases or alias in self._aliases:
            return self._aliases.get(word) or self._aliases[alias], True
        name = word.lstrip("-").replace("-", "_")
        if name in self.settings:
            return self.settings[name], True
        positive = self.settings.get(name.removeprefix("no_"))
        return (positive, False) if positive and positive.kind == "bool" else None

    def unknown(self, word: str, where: str) -> ConfigError:
        name = word.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, [s.name for s in self.settings.values() if s.works], 3, 0.6)
        flags = [self.settings[n].flag if word.startswith("-") else n for n in near]
        remedy = f"Did you mean {' or '.join(flags)}?" if near else "See all options: pagoda serve --help"
        return ConfigError(f"{where}: unknown option {word}", remedy=remedy)


def resolve(
    argv: Sequence[str], environ: Mapping[str, str], file: tuple[str, Mapping[str, Any]] | None = None
) -> Settings:
    """Join the sources: command line over environment over file (its name and content) over default."""
    catalog = Catalog()
    given: list[Given] = []
    if file is not None:
        given += _from_file(catalog, *file)
    given += _from_environment(catalog, environ)
    given += from_command_line(catalog, argv)
    return _join(given, _typing_slips(catalog, environ))


def from_command_line(catalog: Catalog, argv: Sequence[str]) -> list[Given]:
    """Read the arguments in order; words that belong to no flag name the model."""
    out: list[Given] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-":
            out.append(Given(catalog.settings["model"], word, COMMAND_LINE))
            continue
        name, equals, value = word.partition("=")
        name, _, path = name.partition(".")
        if re.fullmatch(r"-O\d", name):
            name, equals, value = "-O", "=", name[2:]
        found = catalog.find(name)
        if found is None:
            raise catalog.unknown(name, "command line")
        setting, positive = found
        if equals:
            raw: Any = value
        elif setting.kind == "bool":
            raw = "true" if positive else "false"
        else:
            raw = _next_values(setting, name, words)
        if path:
            raw = _dotted(path, raw)
        if equals and not positive:
            raise ConfigError(f"{name} takes no value", remedy=f"Write {name}, or {setting.flag} to turn it on")
        out.append(Given(setting, raw if positive else "false", COMMAND_LINE))
    return out


def _next_values(setting: Setting, name: str, words: list[str]) -> Any:
    if not words or (words[0].startswith("-") and not NUMBER.fullmatch(words[0])):
        example = setting.choices[0] if setting.choices else "VALUE"
        raise ConfigError(f"{name} needs a value", remedy=f"Write {name} {example}")
    values = [words.pop(0)]
    # A path behind a list of names is the model: nobody calls a model's second name ./x.
    while setting.kind.startswith("tuple") and words and not words[0].startswith(("-", "/", "./", "../", "~")):
        values.append(words.pop(0))
    return values if setting.kind.startswith("tuple") else values[0]


def _dotted(path: str, raw: Any) -> Any:
    """`--x.a.b 3` is `--x '{"a": {"b": 3}}'`."""
    try:
        value = json.loads(raw)
    except (TypeError, ValueError):
        value = raw
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _from_environment(catalog: Catalog, environ: Mapping[str, str]) -> Iterable[Given]:
    for setting in catalog.settings.values():
        for variable in setting.variables:
            # Compose files set variables to nothing; that is the same as not setting them.
            if raw := environ.get(variable, "").strip():
                words = _split(raw) if setting.kind.startswith("tuple") else raw
                yield Given(setting, words, f"environment {variable}")
                break


def _split(raw: str) -> list[str]:
    return [raw] if raw.startswith("[") else raw.split(",")


def _from_file(catalog: Catalog, name: str, content: Mapping[str, Any]) -> Iterable[Given]:
    for key, raw in content.items():
        found = catalog.find(key)
        if found is None:
            raise catalog.unknown(key, name)
        setting, positive = found
        if raw is not None:
            yield Given(setting, raw if positive else not convert(setting, raw, key), name)


def _typing_slips(catalog: Catalog, environ: Mapping[str, str]) -> list[str]:
    known = {v for s in catalog.settings.values() for v in s.variables}
    out = []
    for variable in environ:
        if variable.startswith("PAGODA_") and variable not in known:
            near = difflib.get_close_matches(variable, known, 1, 0.85)
            out += [f"{variable} is not a variable of Pagoda; did you mean {near[0]}?"] if near else []
    return out


def _join(given: Sequence[Given], notices: list[str]) -> Settings:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    every: dict[str, list[Any]] = {}  # of what may be given for each of several models
    notes: dict[str, str] = {}
    for one in given:
        name, flag = one.setting.name, one.setting.flag
        value = convert(one.setting, one.raw, flag if one.origin == COMMAND_LINE else f"{one.origin}: {name}")
        again_here = origins.get(name) == one.origin
        if name in ("model", "served_model_name"):
            every[name] = [*(every[name] if again_here else []), value]
        if (
            again_here
            and not _mergeable(values[name], value)
            and not (name in every and _differ(every.get("model", ())))
        ):
            again = "" if values[name] == value else f": the last one counts, {_shown(one.setting, value)}"
            notices.append(f"{'the model' if name == 'model' else flag} was given twice{again}")
        values[name] = {**values[name], **value} if _mergeable(values.get(name), value) else value
        origins[name] = one.origin
        if one.setting.note:
            notes[name] = f"{flag}: {one.setting.note}"
        if not one.setting.works and value != one.setting.default:
            raise ConfigError(f"{flag}: {one.setting.help}", remedy=f"Leave {flag} out")
    _several_models(values, origins, every)
    _name_of_model(values, origins)
    known = {s.name for s in declared()}
    options = Options(**{name: value for name, value in values.items() if name in known})
    return Settings(options, {n: origins.get(n, DEFAULT) for n in known}, (*notices, *notes.values()))


def _mergeable(old: Any, new: Any) -> bool:
    return isinstance(old, Mapping) and isinstance(new, Mapping)


def _shown(setting: Setting, value: Any) -> str:
    return "***" if setting.secret else str(value)


def _differ(named: Sequence[str]) -> bool:
    return len(set(named)) > 1


def _several_models(values: dict[str, Any], origins: dict[str, str], every: Mapping[str, list[Any]]) -> None:
    """Models that were named one after the other become a list, each with its name of those given in this order."""
    models = list(dict.fromkeys(every.get("model", [])))
    if "models" in values and models:
        raise ConfigError(
            f"A model ({models[0]}) and a list of models were given", remedy="Add it to the list, or leave one out"
        )
    if len(models) < 2:
        return
    names = [name for given in every.get("served_model_name", []) for name in given]
    if names and len(names) != len(models):
        raise ConfigError(
            f"--served-model-name gives {len(names)} names for {len(models)} models",
            remedy="Give one for each, in the same order",
        )
    named = zip(models, names or [None] * len(models), strict=True)
    values["models"] = tuple({"model": model, **({"served_model_name": [n]} if n else {})} for model, n in named)
    origins["models"] = origins.pop("model")
    for table in (values, origins):
        table.pop("served_model_name", None)
    del values["model"]


def each_model(settings: Settings) -> tuple[Options, ...]:
    """The options of each model: those of all, and on top of them its own. One where no list was given."""
    options = settings.options
    if not options.models:
        return (options,)
    catalog = Catalog()
    return tuple(_own_options(catalog, options, number, table) for number, table in enumerate(options.models, 1))


def _own_options(catalog: Catalog, shared: Options, number: int, table: Mapping[str, Any]) -> Options:
    where = f"models, number {number}"
    own: dict[str, Any] = {"models": (), "served_model_name": ()}
    if number == 1:
        own["keep_alive"] = "-1"
    for key, raw in table.items():
        found = catalog.find(key)
        if found is None:
            raise catalog.unknown(key, where)
        setting, positive = found
        if setting.group == "Server" or setting.name in ("models", "upstream", "fallback"):
            raise ConfigError(f"{where}: {key} is for all models", remedy=f"Give {setting.flag} beside the list")
        value = convert(setting, raw, f"{where}: {key}")
        if not setting.works and value != setting.default:
            raise ConfigError(f"{where}: {key}: {setting.help}", remedy=f"Leave {key} out")
        if setting.name in Options.__dataclass_fields__:
            own[setting.name] = value if positive else not value
    if not own.get("model"):
        raise ConfigError(f"{where}: it names no model", remedy="Write it as {model: ./folder}")
    return replace(shared, **own)


def _name_of_model(values: dict[str, Any], origins: dict[str, str]) -> None:
    """MODEL_NAME is the model where nothing else names one; else a name for it, beside the path as typed."""
    if origins.get("served_model_name") != "environment MODEL_NAME":
        return
    if "model" in values:
        values["served_model_name"] = (*values["served_model_name"], values["model"])
    else:
        values["model"] = ",".join(values.pop("served_model_name"))
        origins["model"] = origins.pop("served_model_name")
