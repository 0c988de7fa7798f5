"""`pagoda top`, and the Grafana dashboard: both read /metrics, and nothing that is not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from api_fake import Client, FakeEngine, make_server, on_port

from pagoda.cli.top import address, compare, text
from pagoda.deploy.service.scrape import CannotAsk, ask, health, parse
from pagoda.errors import ConfigError

ROOT = Path(__file__).parent.parent
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def top(*words: str, key: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagoda.cli.main", "top", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRON, "PAGODA_API_KEY": key}, timeout=60)


def exported() -> set[str]:
    """Every name on the metrics page of a server that has answered something."""
    with Client(make_server()) as client:
        assert client.chat().status_code == 200
        page = client.get("/metrics").text
    return set(re.findall(r"^(?:# HELP )?([a-z_:]+)", page, re.M)) - {"#"}


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:vllm:|pagoda:|process_)[a-z_]+", expression))


def test_every_metric_of_the_dashboard_is_exported() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    targets: list[dict[str, Any]] = [target for panel in dashboard["panels"] for target in panel["targets"]]
    queries = [item["query"]["query"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    named = set().union(*(names_in(text) for text in [*(target["expr"] for target in targets), *queries]))
    assert len(named) > 15 and len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    missing = named - exported()
    assert not missing
    assert "vllm:no_such_total" not in exported()


def test_every_metric_of_top_is_exported() -> None:
    code = (ROOT / "src/pagoda/cli/top.py").read_text() + (ROOT / "src/pagoda/cli/service.py").read_text()
    named = {n for literal in re.findall(r'"([a-z_:]+)"', code) for n in names_in(literal)}
    names = exported()
    assert len(named) > 8
    assert not {n for n in named if n not in names and f"{n}_count" not in names}


def test_once_shows_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    with on_port(make_server(engine), engine) as url:
        done = top("--once", "--interval", "0.1", url)
        assert done.returncode == 0, done.stderr
        head, line = done.stdout.splitlines()
        assert head.split()[:4] == ["MODEL", "RUN", "WAIT", "TOK/S"]
        cells = line.split()
        assert cells[1:3] == ["0", "0"] and "25%" in cells
        (row,) = json.loads(top("--once", "--json", "--interval", "0.1", f"{url}/v1").stdout)
        assert row["cache_share"] == 0.25 and row["memory_bytes"] > 10 << 20
        assert health(url) == "ready"


def test_a_key_is_sent_and_a_silent_server_named() -> None:
    engine = FakeEngine()
    with on_port(make_server(engine, api_keys=["k"]), engine) as url:
        assert top("--once", "--interval", "0.1", url, key="k").returncode == 0
        done = top("--once", "--interval", "0.1", url)
        assert done.returncode == 69 and "needs an API key" in done.stdout
    done = top("--once", "--interval", "0.1", url)
    assert done.returncode == 69 and "nobody answers" in done.stdout
    assert health(url) == ""
    with pytest.raises(CannotAsk):
        ask("http://127.0.0.1:1/metrics")


def test_what_happened_between_two_looks() -> None:
    page = """
vllm:num_requests_running{{model_name="m"}} 2
vllm:num_requests_waiting{{model_name="m"}} 1
vllm:kv_cache_usage_perc{{model_name="m"}} 0.5
vllm:generation_tokens_total{{model_name="m"}} {tokens}
vllm:prefix_cache_queries_total{{model_name="m"}} {tokens}
vllm:prefix_cache_hits_total{{model_name="m"}} {half}
vllm:time_to_first_token_seconds_bucket{{model_name="m",le="1"}} 9
vllm:time_to_first_token_seconds_sum{{model_name="m"}} {half}
vllm:time_to_first_token_seconds_count{{model_name="m"}} {tokens}
vllm:request_success_total{{model_name="m",finished_reason="stop"}} 3
vllm:request_success_total{{model_name="m",finished_reason="length"}} 4
process_resident_memory_bytes 1e9
"""
    old, new = (parse(page.format(tokens=t, half=t / 2), at) for t, at in ((100, 10.0), (300, 12.0)))
    (row,) = compare({"u": old}, {"u": new})
    assert (row.running, row.waiting, row.tokens_per_s, row.cache_share) == (2, 1, 100.0, 0.5)
    assert (row.prefix_hit_share, row.first_token_s, row.next_token_s, row.ended) == (0.5, 0.5, None, 7)
    # After a restart the counters begin anew: no negative rates.
    (row,) = compare({"u": new}, {"u": old})
    assert row.tokens_per_s == 0.0 and row.first_token_s is None
    shown = text([row, *compare({"v": "x"}, {"v": "nobody answers at v"})])
    assert "954 MiB" in shown and shown.endswith("nobody answers at v")


def test_addresses() -> None:
    assert address("8001") == "http://localhost:8001"
    assert address("http://h:1/v1/") == "http://h:1"
    assert address("h:8000") == "http://h:8000"
    with pytest.raises(ConfigError):
        address("ftp://x")
    assert top("--interval", "0").returncode == 78
