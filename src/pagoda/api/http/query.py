"""Parameters in the query of a URL: words from a list, whole numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from starlette.requests import Request

from pagoda.errors import BadRequest

_SCHEMAS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "after": {"type": "string"},
        "purpose": {"type": "string"},
    }
)


def schemas(*names: str) -> Mapping[str, Mapping[str, Any]]:
    """The JSON schemas of these parameters."""
    return {name: _SCHEMAS[name] for name in names}


def choice(request: Request, name: str, words: Sequence[str], default: str) -> str:
    """Raises BadRequest for any word that is not among them."""
    given = request.query_params.get(name) or default
    if given not in words:
        raise BadRequest(f"{name} must be {' or '.join(words)}", param=name)
    return given


def number(request: Request, name: str, default: int, low: int, high: int) -> int:
    """Raises BadRequest for what is no whole number, or out of its range."""
    given = request.query_params.get(name)
    if not given:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 10 and low <= int(given) <= high):
        raise BadRequest(f"{name} must be a whole number from {low} to {high}", param=name)
    return int(given)
