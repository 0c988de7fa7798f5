"""The routes of the gateway: the same as those of one model's server, answered for all of them or passed on."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api import docs, status
from pagoda.api.app import Door, guarded_app
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.http.stream import Reply
from pagoda.api.ollama.blobs import found_in, taken_into
from pagoda.api.ollama.models import API_VERSION
from pagoda.api.ollama.protocol import OllamaVersion
from pagoda.api.routes import endpoints
from pagoda.api.serving.access import check_may_change
from pagoda.api.serving.blobs import BlobStore
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.names import not_served
from pagoda.api.status import ServerLoad, StatusReply, VersionReply, Welcome
from pagoda.gateway import lists
from pagoda.gateway.passing import CHANGES
from pagoda.gateway.proxy import Proxy
from pagoda.options.config import Options

Handler = Callable[[Request], Awaitable[Reply]]


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """Answers what is asked of all models together; `proxy` passes on the rest.

    `blobs` are the files that clients send to make models of: the server of each model finds them in the same folder.
    """

    proxy: Proxy
    blobs: BlobStore
    version: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def state(self) -> str:
        """Ready when the first model is; the others are loaded when they are asked for."""
        if self.proxy.draining:
            return "shutting down"
        first = self.proxy.fleet.first
        return "ready" if first.loads and not first.crashed else "loading"

    def routes(self) -> Mapping[str, Handler]:
        return {
            "/": self._root,
            "/health": self._health,
            "/ping": self._health,
            "/version": self._version,
            "/load": self._load,
            "/server_info": self._info,
            "/metrics": self._metrics,
            "/docs": self._docs,
            "/openapi.json": self._openapi,
            "/models": self._models,
            "/models/{model:path}": self._model,
            "/api/tags": self._tags,
            "/api/ps": self._ps,
            "/api/version": self._ollama_version,
            "/api/blobs/{digest}": self._blob,
        }

    async def _health(self, request: Request) -> Reply:
        ready = self.state == "ready"
        headers = {} if ready else {"retry-after": "1"}
        return Response(to_json(StatusReply(status=self.state)), 200 if ready else 503, headers, JSON)

    async def _version(self, request: Request) -> Reply:
        return Response(to_json(VersionReply(version=self.version)), media_type=JSON)

    async def _load(self, request: Request) -> Reply:
        return Response(to_json(ServerLoad(server_load=self.proxy.live)), media_type=JSON)

    async def _info(self, request: Request) -> Reply:
        models = [
            {"names": child.names, "state": child.state, "need_bytes": child.sized.need_bytes, "running": child.busy}
            for child in self.proxy.fleet.children
        ]
        upstream = None if self.proxy.upstream is None else str(self.proxy.upstream.place)
        body = {
            "version": self.version, "state": self.state, "models": models, "upstream": upstream,
            "budget_bytes": self.proxy.fleet.budget_bytes,
        }  # fmt: skip
        return Response(to_json(body), media_type=JSON)

    async def _metrics(self, request: Request) -> Reply:
        return Response(await lists.metrics(self.proxy), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _docs(self, request: Request) -> Reply:
        return status.page_response(docs.page(docs.openapi(endpoints(), self.version)))

    async def _openapi(self, request: Request) -> Reply:
        return docs.openapi_response(docs.openapi(endpoints(), self.version))

    async def _models(self, request: Request) -> Reply:
        data = await lists.cards(self.proxy, self.created)
        return Response(to_json({"object": "list", "data": data}), media_type=JSON)

    async def _model(self, request: Request) -> Reply:
        wanted = request.path_params["model"]
        name = self.proxy.fleet.name_of(wanted) or wanted
        for card in await lists.cards(self.proxy, self.created):
            if card["id"] == name:
                return Response(to_json(card), media_type=JSON)
        raise not_served(wanted, self.proxy.fleet.names)

    async def _tags(self, request: Request) -> Reply:
        return Response(to_json({"models": await lists.tags(self.proxy, self.created)}), media_type=JSON)

    async def _ps(self, request: Request) -> Reply:
        return Response(to_json({"models": await lists.loaded(self.proxy, self.created)}), media_type=JSON)

    async def _ollama_version(self, request: Request) -> Reply:
        return Response(to_json(OllamaVersion(version=API_VERSION)), media_type=JSON)

    async def _blob(self, request: Request) -> Reply:
        return found_in(self.blobs, request) if request.method == "HEAD" else await taken_into(self.blobs, request)

    async def _root(self, request: Request) -> Reply:
        if request.method == "HEAD" or request.headers.get("user-agent", "").startswith("ollama"):
            return Response("Ollama is running", media_type="text/plain")
        if status.wants_page(request):
            return status.page()
        shown = ["/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/docs"]
        names = list(self.proxy.fleet.names)
        reply = Welcome(name="pagoda", version=self.version, status=self.state, models=names, endpoints=shown)
        return Response(to_json(reply), media_type=JSON)


@dataclass(frozen=True, slots=True)
class _Access:
    local: bool
    api_keys: Sequence[str]


def create_app(gateway: Gateway, options: Options, *, local: bool) -> Starlette:
    """The application, behind the same guard as that of one model: keys are checked here, and nowhere behind."""
    own = gateway.routes()
    access = _Access(local, options.api_key)

    async def answer(endpoint: Endpoint, request: Request) -> Reply:
        handler = own.get(endpoint.path)
        if endpoint.path in CHANGES and request.method != "HEAD":
            check_may_change(access)
        return await (gateway.proxy.answer(endpoint, request) if handler is None else handler(request))

    door = Door(
        table=endpoints(),
        answer=answer,
        rejected=lambda reason: None,
        api_keys=options.api_key,
        allowed_origins=options.allowed_origins,
        options=options,
        local=local,
        root_path=options.root_path,
        max_requests_per_key=options.max_requests_per_key,
    )
    return guarded_app(door)
