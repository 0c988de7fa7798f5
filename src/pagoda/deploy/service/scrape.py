"""Looks at a running server from outside: /health and /metrics."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from pagoda.errors import PagodaError

TIMEOUT_S = 5.0
_OF_EACH_ENGINE = "vllm:num_requests_running"


class CannotAsk(PagodaError):
    """The server does not answer, or not to us."""

    exit_code = 69


@dataclass(frozen=True, slots=True)
class Sample:
    """The metrics of one server at one moment: the sum of each name, by model and without labels.

    `engines` is how many there are of each model.
    """

    at_s: float
    models: tuple[str, ...]
    values: Mapping[str, Mapping[str, float]]
    engines: Mapping[str, int]

    def get(self, name: str, model: str = "") -> float:
        """A value; 0 where the server has none."""
        return self.values.get(name, {}).get(model, 0.0)

    def rate(self, name: str, before: Sample, model: str = "") -> float:
        """How much a counter grows per second; 0 over a restart."""
        passed_s = self.at_s - before.at_s
        return max(0.0, self.get(name, model) - before.get(name, model)) / passed_s if passed_s > 0 else 0.0


def parse(text: str, at_s: float) -> Sample:
    """The sample in a page of Prometheus text."""
    values: dict[str, dict[str, float]] = {}
    engines: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            model = one.labels.get("model_name", "")
            engines[model] += one.name == _OF_EACH_ENGINE
            if "le" not in one.labels:
                of_name = values.setdefault(one.name, {})
                of_name[model] = of_name.get(model, 0.0) + one.value
    return Sample(at_s, tuple(values.get(_OF_EACH_ENGINE, {})), values, engines)


def sample(url: str, key: str = "") -> Sample:
    """The metrics of the server at `url` now."""
    return parse(ask(f"{url.rstrip('/')}/metrics", key), time.monotonic())


def health(url: str) -> str:
    """`ready`, another state that the server tells, or '' where nobody answers."""
    try:
        return str(json.loads(ask(f"{url.rstrip('/')}/health", any_status=True)).get("status", ""))
    except (CannotAsk, ValueError, AttributeError):
        return ""


def ask(url: str, key: str = "", *, any_status: bool = False) -> str:
    """The body that a GET gives; never by a proxy, which could not reach this machine."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as reply:
            return str(reply.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        with error:
            if any_status:
                return error.read().decode("utf-8", "replace")
        if error.code == 401:
            raise CannotAsk(f"{url} needs an API key", remedy="Give it: PAGODA_API_KEY=KEY in front") from None
        raise CannotAsk(f"{url} answers {error.code}", remedy="Is that a server of Pagoda?") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise CannotAsk(f"nobody answers at {url}: {reason}", remedy="Start it: pagoda serve MODEL") from None
