"""One value of an option, from text or from a config file, in its own type."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.errors import ConfigError
from pagoda.options.flags import REFUSED_VALUES
from pagoda.options.setting import Setting

NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)([kmgtKMGT]?)")
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def convert(setting: Setting, raw: Any, where: str) -> Any:
    """The value in its type, or a ConfigError that begins with `where`."""
    kind = setting.kind
    if kind == "bool":
        value: Any = raw if isinstance(raw, bool) else _TRUTH.get(str(raw).lower())
        if value is None:
            raise ConfigError(f"{where}: {raw} is neither true nor false", remedy="Give true or false")
        return value
    if kind.startswith("tuple[Mapping"):
        return _tables(raw, where)
    if kind.startswith("tuple"):
        return _words(raw if isinstance(raw, list | tuple) else [raw])
    if kind.startswith("Mapping"):
        return _table(raw, where)
    if kind in ("int", "float"):
        return _number(setting, raw, where)
    text = str(raw)
    if (setting.choices and text not in setting.choices) or (setting.name, text) in REFUSED_VALUES:
        raise _not_a_choice(setting, text, where)
    return text


def _words(given: Sequence[Any]) -> tuple[str, ...]:
    """Several values; vLLM takes those of --allowed-origins as one list in JSON."""
    if len(given) == 1 and str(given[0]).startswith("["):
        try:
            given = json.loads(str(given[0]))
        except ValueError:
            pass  # an address in brackets, or any other word that begins so
    return tuple(json.dumps(each) if isinstance(each, Mapping) else str(each) for each in given)


def _number(setting: Setting, raw: Any, where: str) -> int | float | None:
    if setting.default is None and str(raw) in ("auto", "-1"):
        return None
    match = NUMBER.fullmatch(str(raw).strip()) if not isinstance(raw, bool) else None
    value = float(match[1]) * _SCALE[match[2]] if match else math.nan
    if math.isnan(value) or (setting.kind == "int" and value != round(value)):
        example = "a number such as 0.9" if setting.kind == "float" else "a whole number such as 8192, 8k or 8K"
        raise ConfigError(f"{where}: {raw} is not a number that fits", remedy=f"Give {example}")
    if (setting.low is not None and value < setting.low) or (setting.high is not None and value > setting.high):
        top = f" to {setting.high:g}" if setting.high is not None else " or more"
        raise ConfigError(f"{where}: {raw} is out of range", remedy=f"Give {setting.low:g}{top}")
    return round(value) if setting.kind == "int" else value


def _table(raw: Any, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
    except ValueError:
        value = None
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {raw} is not a JSON object", remedy="""Write it as '{"name": value}'""")
    return value


def _tables(raw: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Of a list of tables; a word stands for the model of that name."""
    items = raw if isinstance(raw, list | tuple) else [raw]
    if len(items) == 1 and str(items[0]).startswith("["):
        try:
            items = json.loads(items[0])
        except (TypeError, ValueError):
            raise ConfigError(f"{where}: this is not JSON", remedy="""Write it as '[{"model": "./a"}]'""") from None
    tables = [{"model": item} if isinstance(item, str) else item for item in items]
    if not all(isinstance(item, Mapping) and all(isinstance(key, str) for key in item) for item in tables):
        raise ConfigError(f"{where} is a list of models", remedy="Write a line for each, such as - model: ./a")
    return tuple(tables)


def _not_a_choice(setting: Setting, text: str, where: str) -> ConfigError:
    if (setting.name, text) in REFUSED_VALUES:
        message, remedy = REFUSED_VALUES[setting.name, text]
        return ConfigError(f"{where} {text}: {message}", remedy=remedy)
    return ConfigError(f"{where}: {text} is not known", remedy=f"Give one of {', '.join(setting.choices)}")
