"""The ASGI application: every route behind one guard that checks host and key and turns errors into answers."""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pagoda.api.auth import Keys, check_host
from pagoda.api.body import ClientGone
from pagoda.api.paths import NormalizePath, nearest, typed_path
from pagoda.api.routes import Endpoint, Handler, endpoints
from pagoda.api.server import Server
from pagoda.api.shape import error_response
from pagoda.api.status import page, wants_page
from pagoda.api.stream import Reply
from pagoda.errors import EngineError, MethodNotAllowed, NotFound, PagodaError, Unauthorized

log = logging.getLogger("pagoda.api")


def create_app(server: Server) -> Starlette:
    """The application of one server."""
    table = endpoints()
    keys = Keys(server.api_keys)
    paths = [each.path for each in table if "{" not in each.path]
    middleware = [Middleware(NormalizePath, endpoints=paths, root_path=server.root_path)]
    if server.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(server.allowed_origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "x-pagoda-ignored", "retry-after"],
            )
        )
    app = Starlette(
        routes=[Route(each.path, Guarded(server, keys, each)) for each in table],
        middleware=middleware,
    )
    app.router.redirect_slashes = False
    app.router.default = Guarded(server, keys, Endpoint("", (), _not_found(table), ""))
    return app


class Guarded:
    """One matched route. What it guards is decided when the table is built, never from the text of a URL."""

    def __init__(self, server: Server, keys: Keys, endpoint: Endpoint) -> None:
        self._server = server
        self._keys = keys
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await self._reply(Request(scope, receive))
        except ClientGone:
            return
        await reply(scope, receive, send)

    async def _reply(self, request: Request) -> Reply:
        endpoint = self._endpoint
        shape = endpoint.dialect.error
        try:
            if self._server.local:
                check_host(request.headers, self._server.allowed_origins)
            if not endpoint.public:
                self._keys.check(request.headers)
            self._check_method(request)
            return await endpoint.handler(self._server, request)
        except Unauthorized as error:
            return page(401) if endpoint.sign_in and wants_page(request) else error_response(error, body=shape)
        except MethodNotAllowed as error:
            return error_response(error, {"allow": ", ".join(endpoint.methods)}, shape)
        except PagodaError as error:
            return error_response(error, body=shape)
        except ClientGone:
            raise
        except Exception:
            log.exception("%s %s failed", request.method, typed_path(request.scope))
            return error_response(EngineError("the server failed on this request; its log says why"), body=shape)

    def _check_method(self, request: Request) -> None:
        methods = self._endpoint.methods
        if not methods or request.method in methods or (request.method == "HEAD" and "GET" in methods):
            return
        raise MethodNotAllowed(f"{typed_path(request.scope)} takes {' or '.join(methods)}, not {request.method[:20]}")


def _not_found(table: tuple[Endpoint, ...]) -> Handler:
    shown = {each.path: each.shown for each in table if "{" not in each.path}

    async def not_found(server: Server, request: Request) -> Reply:
        near = nearest(request.scope["path"], list(shown))
        remedy = f"Did you mean {shown[near]}?" if near else "GET /docs lists what there is"
        raise NotFound(f"there is no {typed_path(request.scope)} here", remedy=remedy)

    return not_found
