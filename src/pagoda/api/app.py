"""The ASGI application: every route behind one guard that checks host and key and turns errors into answers."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pagoda.api.http.auth import CALLER, Keys, check_host
from pagoda.api.http.body import MAX_BODIES_BYTES, PLACE, ClientGone
from pagoda.api.http.errors import error_response
from pagoda.api.http.paths import NormalizePath, nearest, typed_path
from pagoda.api.http.room import Room
from pagoda.api.http.stream import Reply
from pagoda.api.openai import adapters
from pagoda.api.routes import endpoints
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.server import Server
from pagoda.api.serving.tasks import check_task
from pagoda.api.status import page, wants_page
from pagoda.errors import EngineError, MethodNotAllowed, NotFound, PagodaError, RateLimited, Unauthorized
from pagoda.options.http import HttpOptions

_REQUEST_ID = re.compile(r"[!-~]{1,128}")

log = logging.getLogger("pagoda.api")


@dataclass(frozen=True, kw_only=True)
class Door:
    """What is behind the guard, and who may come in. `answer` gives the reply of an endpoint that may be asked."""

    table: Sequence[Endpoint]
    answer: Callable[[Endpoint, Request], Awaitable[Reply]]
    rejected: Callable[[str], None]
    api_keys: Sequence[str]
    allowed_origins: Sequence[str]
    options: HttpOptions
    local: bool
    root_path: str
    max_requests_per_key: int | None


def create_app(server: Server) -> Starlette:
    """The application of one server."""

    async def answer(endpoint: Endpoint, request: Request) -> Reply:
        check_task(server, endpoint.tasks)
        return await endpoint.handler(server, request)

    door = Door(
        table=(*endpoints(), *(adapters.endpoints() if server.adapters.may_change else ())),
        answer=answer,
        rejected=server.metrics.rejected,
        api_keys=server.api_keys,
        allowed_origins=server.allowed_origins,
        options=server.options,
        local=server.local,
        root_path=server.root_path,
        max_requests_per_key=server.max_requests_per_key,
    )
    return guarded_app(door)


def guarded_app(door: Door) -> Starlette:
    """The application of whatever is behind the door."""
    keys = Keys(door.api_keys, door.max_requests_per_key)
    room = Room(MAX_BODIES_BYTES, door.rejected)
    if door.options.disable_fastapi_docs:
        door = replace(door, table=[each for each in door.table if each.path not in ("/docs", "/openapi.json")])
    by_path: dict[str, list[Endpoint]] = {}
    for each in door.table:
        by_path.setdefault(each.path, []).append(each)
    paths = [path for path in by_path if "{" not in path]
    middleware = [Middleware(NormalizePath, endpoints=paths, root_path=door.root_path)]
    if door.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(door.allowed_origins),
                allow_methods=list(door.options.allowed_methods),
                allow_headers=list(door.options.allowed_headers),
                allow_credentials=door.options.allow_credentials,
                expose_headers=["x-request-id", "x-pagoda-ignored", "retry-after"],
            )
        )
    app = Starlette(
        routes=[Route(path, Guarded(door, keys, room, alike)) for path, alike in by_path.items()],
        middleware=middleware,
    )
    app.router.redirect_slashes = False
    app.router.default = Guarded(door, keys, room, None)
    return app


class Guarded:
    """One matched path. What it guards is decided when the table is built, never from the text of a URL.

    Its endpoints differ in their methods only: the first one's dialect and guard are those of all.
    """

    def __init__(self, door: Door, keys: Keys, room: Room, endpoints: Sequence[Endpoint] | None) -> None:
        self._door = door
        self._keys = keys
        self._room = room
        self._endpoints = endpoints or [Endpoint("", (), _nobody, "")]
        self._nowhere = endpoints is None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with ExitStack() as held:
            try:
                reply = await self._reply(request, held)
            except ClientGone:
                return
            given = request.headers.get("x-request-id")
            if given is not None and _REQUEST_ID.fullmatch(given):
                reply.headers["x-request-id"] = given
            await reply(scope, receive, send)

    async def _reply(self, request: Request, held: ExitStack) -> Reply:
        """The answer, or the error as one; `held` is left when it is sent."""
        endpoint = self._endpoints[0]
        shape = endpoint.dialect.error
        try:
            if self._door.local:
                check_host(request.headers, self._door.allowed_origins)
            if not endpoint.public:
                request.scope[CALLER] = self._keys.check(request.headers)
            if self._nowhere:
                raise _not_found(self._door.table, request)
            found = self._of_method(request)
            if found.tasks:
                held.enter_context(self._keys.call(request.scope.get(CALLER)))
            with self._room.place() as request.scope[PLACE]:
                return await self._door.answer(found, request)
        except Unauthorized as error:
            return page(401) if endpoint.sign_in and wants_page(request) else error_response(error, body=shape)
        except RateLimited as error:
            self._door.rejected("rate_limit")
            return error_response(error, body=shape)
        except MethodNotAllowed as error:
            return error_response(error, {"allow": ", ".join(self._methods)}, shape)
        except PagodaError as error:
            return error_response(error, body=shape)
        except ClientGone:
            raise
        except Exception:
            log.exception("%s %s failed", request.method, typed_path(request.scope))
            return error_response(EngineError("the server failed on this request; its log says why"), body=shape)

    @property
    def _methods(self) -> list[str]:
        return [method for each in self._endpoints for method in each.methods]

    def _of_method(self, request: Request) -> Endpoint:
        wanted = (request.method, "GET") if request.method == "HEAD" else (request.method,)
        for each in self._endpoints:
            if not each.methods or any(method in each.methods for method in wanted):
                return each
        taken = " or ".join(self._methods)
        raise MethodNotAllowed(f"{typed_path(request.scope)} takes {taken}, not {request.method[:20]}")


async def _nobody(server: Server, request: Request) -> Reply:
    raise RuntimeError("a path that is not there has no handler")


def _not_found(table: Sequence[Endpoint], request: Request) -> NotFound:
    shown = {each.path: each.shown for each in table if "{" not in each.path}
    near = nearest(request.scope["path"], list(shown))
    remedy = f"Did you mean {shown[near]}?" if near else "GET /docs lists what there is"
    return NotFound(f"there is no {typed_path(request.scope)} here", remedy=remedy)
