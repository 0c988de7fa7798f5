"""Typed reading of a model's configuration: every value is checked, every complaint names its field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from pagoda.errors import ModelError

MOST_LAYERS = 4096


class Fields:
    """A table of settings (`config.json`, or GGUF metadata below `prefix`). None counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values = values
        self.where = where
        self.prefix = prefix

    def get(self, name: str) -> Any:
        return self.values.get(self.prefix + name)

    def error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self.where}: {self.prefix}{name} {problem}")

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
            raise self.error(name, f"is {value!r}, must be a whole number from {least} to {most}")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < _as_float(value) < math.inf:
            raise self.error(name, f"is {value!r}, must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self.error(name, f"is {value!r}, must be true or false")
        return bool(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id, a list of them, or nothing."""
        value = self.get(name)
        ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(i, bool) or not isinstance(i, Integral) or int(i) < 0 for i in ids):
            raise self.error(name, f"is {value!r}, must be a token id or a list of them")
        return tuple(int(i) for i in ids)

    def words(self, name: str, known: Sequence[str], default: Sequence[str]) -> list[str]:
        """One of the known words for each layer."""
        value = self.get(name)
        if value is None:
            return list(default)
        if not isinstance(value, list) or len(value) != len(default) or any(word not in known for word in value):
            raise self.error(name, f"is {value!r}, must hold {' or '.join(known)} for each layer")
        return value

    def uniform_integer(self, name: str, default: int | None = None) -> int:
        """A number that GGUF may also give once per layer; layers that differ are not supported."""
        value = self.get(name)
        if not isinstance(value, list | tuple | np.ndarray):
            return self.integer(name, default)
        if any(not isinstance(v, Integral) for v in value):
            raise self.error(name, f"is {value!r}, must be a whole number or one for each layer")
        distinct = sorted({int(v) for v in value})
        if len(distinct) != 1 or distinct[0] < 1:
            raise self.error(name, f"differs from layer to layer ({distinct}), which is not supported")
        return distinct[0]


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf
