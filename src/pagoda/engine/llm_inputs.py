"""What `LLM` is given: options as keywords, and prompts in the forms that vLLM takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pagoda.options.check import check
from pagoda.options.config import Options
from pagoda.options.resolve import Catalog, resolve
from pagoda.types import Adapter, Image

_log = logging.getLogger("pagoda")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as token ids, the pictures that lie on some of them, and the adapter that it is for."""

    text: str | None
    ids: list[int]
    images: list[Image] = field(default_factory=list)
    adapter: Adapter | None = None


Prompt = str | Sequence[int] | Mapping[str, Any] | Encoded


def options_from(table: Mapping[str, Any]) -> Options:
    """The server's options from keywords. TypeError for one that nobody knows, as Python does it."""
    catalog = Catalog()
    for name in table:
        if catalog.find(name) is None:
            raise TypeError(str(catalog.unknown(name, "LLM()")))
    settings = resolve([], {}, ("LLM()", table))
    check(settings)
    for notice in settings.notices:
        _log.warning("%s", notice)
    return settings.options


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several: a list of numbers is one."""
    if isinstance(prompts, str | Mapping | Encoded):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
