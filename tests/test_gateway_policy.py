"""The gateway's decisions, without processes: what is loaded, what goes, what a keep_alive means, merged metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import engine_tiny
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.deploy.plan.machines import Machine
from pagoda.errors import BadRequest, MemoryShort
from pagoda.gateway.lists import merged
from pagoda.gateway.policy import BUSY_GRACE_S, Seen, Step, expired, keep_alive_s, next_step
from pagoda.gateway.sizes import budget_bytes, sized
from pagoda.gateway.wire import Place, place_of
from pagoda.options.config import Options

WANTED = Seen("wanted", "stopped", 4)


def ready(name: str, need: int, since: float = 0.0, busy: int = 0, keep: float = 300.0) -> Seen:
    return Seen(name, "ready", need, busy, since, keep)


def test_what_fits_is_started() -> None:
    assert next_step(WANTED, [ready("a", 4)], 8, 0.0) == Step(start=True)
    assert next_step(WANTED, [Seen("a", "stopped", 99)], 4, 0.0) == Step(start=True)


def test_the_least_recently_used_one_goes_and_only_as_many_as_must() -> None:
    others = [ready("young", 4, since=9.0), ready("old", 4, since=1.0), ready("middle", 4, since=5.0)]
    assert next_step(WANTED, others, 12, 0.0) == Step(start=False, unload=("old",))
    assert next_step(WANTED, others, 8, 0.0) == Step(start=False, unload=("old", "middle"))
    stays = [ready("first", 4, since=0.0, keep=math.inf), ready("other", 4, since=9.0)]
    assert next_step(WANTED, stays, 8, 0.0).unload == ("other",), "what was to stay goes last"


def test_a_busy_one_goes_only_for_somebody_who_has_waited() -> None:
    others = [ready("a", 8, busy=1)]
    assert next_step(WANTED, others, 8, 0.0) == Step(start=False)
    assert next_step(WANTED, others, 8, BUSY_GRACE_S) == Step(start=False, unload=("a",))


def test_nobody_else_goes_while_one_that_makes_room_is_leaving() -> None:
    others = [Seen("going", "leaving", 4), ready("b", 4)]
    assert next_step(WANTED, others, 8, 99.0) == Step(start=False)
    assert next_step(WANTED, [Seen("a", "loading", 8)], 8, 99.0) == Step(start=False), "what loads is left alone"


STATES = st.sampled_from(["stopped", "loading", "ready", "leaving"])
MODELS = st.lists(
    st.builds(Seen, st.uuids().map(str), STATES, st.integers(1, 9), st.integers(0, 2), st.floats(0, 9)), max_size=6
)


@given(MODELS, st.integers(4, 30), st.floats(0, 20))
def test_memory_is_never_promised_twice(others: list[Seen], budget: int, waited_s: float) -> None:
    step = next_step(WANTED, others, budget, waited_s)
    held = [each for each in others if each.state != "stopped"]
    assert step.start == (sum(each.need_bytes for each in held) + WANTED.need_bytes <= budget)
    by_name = {each.name: each for each in others}
    assert all(by_name[name].state == "ready" for name in step.unload)
    if waited_s >= BUSY_GRACE_S and not step.start and not any(each.state == "loading" for each in held):
        staying = [e for e in held if e.state == "ready" and e.name not in step.unload]
        assert sum(e.need_bytes for e in staying) + WANTED.need_bytes <= budget, "then it gets its place"


def test_what_is_idle_for_too_long_expires() -> None:
    models = [
        ready("idle", 1, since=0.0, keep=10.0), ready("used", 1, since=95.0, keep=10.0),
        ready("busy", 1, since=0.0, busy=1, keep=10.0), ready("stays", 1, since=0.0, keep=math.inf),
        Seen("gone", "stopped", 1),
    ]  # fmt: skip
    assert expired(models, 100.0) == ["idle"]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("5m", 300), ("1h30m", 5400), (0, 0), ("0", 0), ("-1", math.inf), (-1, math.inf), (-1.0, math.inf), (30, 30),
     ("1.5s", 1.5), ("-1m", math.inf), ("100ms", 0.1)],
)  # fmt: skip
def test_keep_alive_as_ollama_writes_it(given: object, seconds: float) -> None:
    assert keep_alive_s(given) == pytest.approx(seconds)


@pytest.mark.parametrize("given", ["", "5", "soon", "5m later", "m", True, {}])
def test_keep_alive_that_is_none(given: object) -> None:
    if given == "5":
        assert keep_alive_s(given) == 5
    else:
        with pytest.raises(BadRequest, match="keep_alive"):
            keep_alive_s(given)


def test_addresses_of_upstreams() -> None:
    assert place_of("http://host:11434", "--upstream") == Place(host="host", port=11434)
    assert place_of("host:8000/v1/", "--upstream") == Place(host="host", port=8000)
    assert place_of("https://example.org/llm/v1", "--upstream") == Place(
        host="example.org", port=443, tls=True, prefix="/llm"
    )
    assert str(place_of("http://[::1]:1", "--upstream")) == "http://[::1]:1"


def test_pages_of_metrics_are_merged() -> None:
    page = (
        "# HELP vllm:x_total Text\n# TYPE vllm:x_total counter\n"
        'vllm:x_total{{engine="0",model_name="{name}"}} 2.0\n'
        "# HELP process_y Mine\n# TYPE process_y gauge\nprocess_y 7.0\n"
    )
    families = {family.name: family for family in merged([("a", page.format(name="a")), ("b", page.format(name="b"))])}
    assert [sample.labels["model_name"] for sample in families["vllm:x"].samples] == ["a", "b"]
    assert [sample.labels for sample in families["process_y"].samples] == [{"model_name": "a"}, {"model_name": "b"}]


def test_what_each_model_may_take_is_planned(tmp_path: Path) -> None:
    path = engine_tiny.write(tmp_path / "tiny")
    options = Options(model=path, device="cpu", served_model_name=("tiny",))
    machine = Machine("a CPU", 1 << 30)
    both = sized([(options, path), (options, path)], machine)
    assert sum(each.need_bytes for each in both) <= budget_bytes(options, machine)
    assert both[0].options.kv_cache_memory_bytes and both[0].context == engine_tiny.CONTEXT
    twins = sized([(replace(options, replicas=2), path)], machine)
    assert twins[0].need_bytes > 1.5 * both[0].weight_bytes
    given = sized([(replace(options, kv_cache_memory_bytes=1 << 22), path)], machine)
    assert given[0].options.kv_cache_memory_bytes == 1 << 22, "what was asked for stays"
    with pytest.raises(MemoryShort, match="does not fit on a CPU, even alone") as error:
        sized([(options, path)], Machine("a CPU", 1 << 20))
    assert error.value.remedy
