"""What the gateway says of all models: /v1/models, /api/tags, /api/ps, /health, /metrics and the like."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from pagoda.api.ollama.models import FOR_EVER, tagged
from pagoda.api.ollama.protocol import OllamaDetails, OllamaModel, timestamp
from pagoda.api.openai.replies import ModelCard, Permission
from pagoda.gateway.child import Child
from pagoda.gateway.proxy import Proxy
from pagoda.gateway.wire import Unreachable, as_json, call

_LIMIT_S = 5.0


async def fetch(child: Child, path: str) -> bytes:
    """What a loaded model's server says; nothing where it does not answer."""
    if child.state != "ready":
        return b""
    try:
        async with asyncio.timeout(_LIMIT_S):
            answer = await call(child.place, "GET", path, child.headers)
            body = await answer.whole()
            return body if answer.status == 200 else b""
    except (Unreachable, TimeoutError):
        return b""


async def cards(proxy: Proxy, created: int) -> list[dict[str, Any]]:
    """The entries of /v1/models: ours, and those of the upstream that have other names."""
    own = [card for child in proxy.fleet.children for card in await _of_child(proxy, child, "/models", created)]
    return own + _others(own, await proxy.upstream.cards() if proxy.upstream else [], "id")


async def tags(proxy: Proxy, created: int) -> list[dict[str, Any]]:
    """The entries of /api/tags."""
    own = [tag for child in proxy.fleet.children for tag in await _of_child(proxy, child, "/api/tags", created)]
    return own + _others(own, await proxy.upstream.tags() if proxy.upstream else [], "name")


async def loaded(proxy: Proxy, created: int) -> list[dict[str, Any]]:
    """The entries of /api/ps: what is loaded here, and until when."""
    out = []
    for child in proxy.fleet.children:
        if child.state == "ready":
            for tag in await _of_child(proxy, child, "/api/ps", created):
                out.append({**tag, "expires_at": _expiry(child)})
    return out


def _expiry(child: Child) -> str:
    if math.isinf(child.keep_alive_s):
        return FOR_EVER
    idle_s = 0.0 if child.busy else time.monotonic() - child.idle_since_s
    moment = datetime.fromtimestamp(time.time() + max(0.0, child.keep_alive_s - idle_s), UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _others(own: Iterable[dict[str, Any]], theirs: Iterable[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    names = {entry[key] for entry in own}
    return [entry for entry in theirs if entry[key] not in names]


async def _of_child(proxy: Proxy, child: Child, path: str, created: int) -> list[dict[str, Any]]:
    """As its own server says it, or by the plan where it is not loaded."""
    key = "data" if path == "/models" else "models"
    content = as_json(await fetch(child, path))
    if isinstance(content, dict) and isinstance(content.get(key), list):
        return list(content[key])
    make = _card if key == "data" else _tag
    return [msgspec.to_builtins(make(child, name, created)) for name in proxy.fleet.names_of(child)]


def _card(child: Child, name: str, created: int) -> ModelCard:
    sized = child.sized
    digest = hashlib.sha256(f"{name}\0{created}".encode()).hexdigest()
    return ModelCard(
        id=name,
        created=created,
        root=sized.path,
        max_model_len=sized.context,
        permission=[Permission(id=f"modelperm-{digest[:32]}", created=created)],
        context_length=sized.context,
        max_tokens=sized.context,
    )


def _tag(child: Child, name: str, created: int) -> OllamaModel:
    sized = child.sized
    details = OllamaDetails(
        format="gguf" if sized.path.endswith(".gguf") else "safetensors",
        family=sized.architecture,
        families=[sized.architecture],
        parameter_size="",
        quantization_level=sized.quantization,
        context_length=sized.context,
    )
    return OllamaModel(
        name=tagged(name),
        model=tagged(name),
        modified_at=timestamp(created),
        size=sized.weight_bytes,
        digest=hashlib.sha256(f"{name}\0{sized.path}".encode()).hexdigest(),
        details=details,
        capabilities=[],
    )


async def metrics(proxy: Proxy) -> bytes:
    """The pages of all loaded models as one, with what only the gateway knows."""
    pages = await asyncio.gather(*(fetch(child, "/metrics") for child in proxy.fleet.children))
    named = [(child.names[0], page.decode()) for child, page in zip(proxy.fleet.children, pages, strict=True)]
    registry = CollectorRegistry()
    registry.register(_Merged([*merged(named), *_own(proxy)]))
    ProcessCollector(namespace="gateway", registry=registry)
    return generate_latest(registry)


def merged(pages: Iterable[tuple[str, str]]) -> list[Metric]:
    """One family of each name; what a server says of itself is told under its model's name."""
    families: dict[str, Metric] = {}
    for model, page in pages:
        for family in text_string_to_metric_families(page):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {"model_name": model, **sample.labels}
                whole.add_sample(sample.name, labels, sample.value)
    return list(families.values())


def _own(proxy: Proxy) -> Iterator[Metric]:
    children = proxy.fleet.children
    up = GaugeMetricFamily("pagoda:model_loaded", "1 if the model is loaded", labels=["model_name"])
    loads = CounterMetricFamily("pagoda:model_loads", "How often the model was loaded", labels=["model_name"])
    waiting = GaugeMetricFamily("pagoda:model_waiting", "Requests that wait for the model", labels=["model_name"])
    for child in children:
        up.add_metric([child.names[0]], float(child.state == "ready"))
        loads.add_metric([child.names[0]], child.loads)
        waiting.add_metric([child.names[0]], child.waiting)
    yield from (up, loads, waiting)
    if proxy.upstream is not None:
        yield CounterMetricFamily("pagoda:upstream_requests", "Requests to the upstream", proxy.upstream.calls)
        yield CounterMetricFamily("pagoda:upstream_failures", "Those without an answer", proxy.upstream.failures)
        yield CounterMetricFamily("pagoda:fallbacks", "Those for a model of this server", proxy.fallbacks)


class _Merged:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
