"""What is asked in a measurement, as the commands of `pagoda bench` are told: lengths, prefixes, or a file."""

from __future__ import annotations

from types import MappingProxyType

from pagoda.bench.prompts import Shape
from pagoda.cli.words import Words
from pagoda.errors import ConfigError

SHAPE_NAMES = MappingProxyType(
    {
        "random-input-len": "input-len",
        "random-output-len": "output-len",
        "custom-output-len": "output-len",
        "sharegpt-output-len": "output-len",
        "random-prefix-len": "prefix-len",
        "random-range-ratio": "range-ratio",
        "prefix-repetition-prefix-len": "prefix-len",
        "prefix-repetition-suffix-len": "input-len",
        "prefix-repetition-output-len": "output-len",
        "prefix-repetition-num-prefixes": "num-prefixes",
    }
)
_DATASETS = ("random", "prefix_repetition", "custom", "sharegpt")


def shape_of(words: Words) -> Shape:
    shape = Shape(
        words.number("input-len", int, 1, 128),
        words.number("output-len", int, 1, 128),
        words.number("range-ratio", float, 0, 0.0),
        words.number("prefix-len", int, 0, 0),
        words.number("num-prefixes", int, 1, 1),
    )
    if shape.spread >= 1:
        raise ConfigError("--range-ratio must be below 1", remedy="0.2 means 20 % more or less")
    return shape


def dataset_of(words: Words) -> str:
    name, path = words.last("dataset-name"), words.last("dataset-path") or ""
    if name is not None and name not in _DATASETS:
        raise ConfigError(f"--dataset-name {name} is not here", remedy=f"Give one of {', '.join(_DATASETS)}")
    if name in ("custom", "sharegpt") and not path:
        raise ConfigError(f"--dataset-name {name} needs a file", remedy="Give it with --dataset-path FILE")
    return path
