"""What one route is: where it lies, who answers, what goes in and out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request

from pagoda.api.http.dialect import OPENAI, Dialect
from pagoda.api.http.stream import Reply
from pagoda.api.serving.server import Server

Handler = Callable[[Server, Request], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route. `path` is without `/v1` (see `paths`); `shown` is how clients are told to write it.

    A `public` one answers without an API key. The `sign_in` one is still shown to browsers without a key, as the body
    of a 401: it is where people type it. No methods means any. Errors are written in the route's `dialect`. `tasks`
    are the kinds of models that it is for (see `tasks`); none means all.

    `event` is the type of a stream's events, `media` the kinds of answers that are not JSON; `query` and `form` are
    the JSON schemas of a query's parameters and of a form.
    """

    path: str
    methods: tuple[str, ...]
    handler: Handler
    summary: str
    body: type[msgspec.Struct] | None = None
    reply: type[msgspec.Struct] | None = None
    event: Any = None
    media: tuple[str, ...] = ()
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    form: Mapping[str, Any] = field(default_factory=dict)
    public: bool = False
    openai: bool = False
    sign_in: bool = False
    dialect: Dialect = OPENAI
    tasks: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        return ("/v1" if self.openai else "") + self.path.replace(":path}", "}")
