"""What --speculative-config says: where drafts come from, and how many tokens they have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from pagoda.errors import ConfigError
from pagoda.options.formats import QUANTIZE_ON_LOAD


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """Drafts by prompt lookup: up to `num_tokens` that followed the last `lookup_max` to `lookup_min` tokens before.

    `always` tries them wherever they can be found, else as many as pay by what was measured. With `model`, a folder or
    .gguf file, that model makes the drafts, its float weights in `quantization`.
    """

    num_tokens: int = 8
    lookup_max: int = 4
    lookup_min: int = 2
    always: bool = False
    model: str | None = None
    quantization: str | None = None

    @property
    def asked_for(self) -> bool:
        """Somebody wants it; else it is only there for where it costs nothing."""
        return self.always or self.model is not None


_MOST_DRAFTS, _MOST_LOOKUP = 64, 32
_DRAFT_MODEL = """Give '{"model": PATH, "num_speculative_tokens": 4}'"""
_NGRAM = """Give '{"method": "ngram", "num_speculative_tokens": 5}', or leave it out"""


def speculation_from(given: Mapping[str, Any]) -> Speculation | None:
    """What --speculative-config says; ConfigError where it cannot be done."""
    if not given:
        return Speculation()
    values = dict(given)
    method = values.pop("method", "draft_model" if "model" in values else "ngram")
    if method == "draft_model":
        return _draft_model(values)
    if method != "ngram":
        raise ConfigError(f"--speculative-config: the method {method} is not here yet", remedy=_NGRAM)
    count = _whole(values, "num_speculative_tokens", 5, 0, _MOST_DRAFTS)
    low, high = values.get("prompt_lookup_min"), values.get("prompt_lookup_max")
    lookup_max = _whole(values, "prompt_lookup_max", 5 if low is None else low, 1, _MOST_LOOKUP)
    lookup_min = _whole(values, "prompt_lookup_min", 5 if high is None else high, 1, lookup_max)
    if values:
        raise ConfigError(f"--speculative-config: {', '.join(values)} is not known to the method ngram", remedy=_NGRAM)
    return Speculation(num_tokens=count, lookup_max=lookup_max, lookup_min=lookup_min, always=True) if count else None


def _draft_model(values: dict[str, Any]) -> Speculation | None:
    count = _whole(values, "num_speculative_tokens", 4, 0, _MOST_DRAFTS)
    model, quantization = values.pop("model", None), values.pop("quantization", None)
    if not isinstance(model, str) or not model:
        raise ConfigError("--speculative-config: model must be the path of a draft model", remedy=_DRAFT_MODEL)
    if quantization not in (None, *QUANTIZE_ON_LOAD):
        raise ConfigError(
            f"--speculative-config: quantization is {quantization}, and must be {' or '.join(QUANTIZE_ON_LOAD)}",
            remedy=_DRAFT_MODEL,
        )
    if values:
        raise ConfigError(f"--speculative-config: {', '.join(values)} is not known here", remedy=_DRAFT_MODEL)
    path = os.path.expanduser(model)
    return Speculation(num_tokens=count, model=path, quantization=quantization) if count else None


def _whole(values: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = values.pop(name, None)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(
            f"--speculative-config: {name} is {value}, and must be a whole number from {low} to {high}", remedy=_NGRAM
        )
    return value
