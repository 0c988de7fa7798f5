"""Prompts by FlashInfer, in a stand-in for it on a stand-in for a GPU: arguments, results, and when it is used."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flash_stand_in
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from cuda_stand_in import install
from cuda_tensors import Forbidden
from test_cuda_steps import answers, core_of, executor_of

from pagoda.backend.torch import flash, ops
from pagoda.backend.torch.batch import Heads, OnHost
from pagoda.backend.torch.kernels import attention
from pagoda.errors import ConfigError

CPU = torch.device("cpu")
REQUESTS = [(7, 0), (1, 40), (5, 30), (33, 2), (1, 0), (2, 15)]


def installed(patch: pytest.MonkeyPatch, faults: dict[str, Any] | None = None) -> flash_stand_in.Calls:
    module, calls = flash_stand_in.make(faults)
    find = importlib.util.find_spec
    patch.setitem(sys.modules, "flashinfer", module)
    patch.setattr(importlib.util, "find_spec", lambda name: module if name == "flashinfer" else find(name))
    return calls


def heads(window: int | None = None, cap: float | None = None, kv_heads: int = 2) -> Heads:
    return Heads(4, kv_heads, 64, 0.125, window, 1e-6, False, soft_cap=cap)


@pytest.mark.parametrize(
    "shape", [heads(), heads(kv_heads=4), heads(20, 5.0), heads(1)], ids=["grouped", "plain", "window, cap", "itself"]
)
def test_what_it_is_given(shape: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scattered pages, prompts with and without keys before them, single tokens, which are for another kernel."""
    calls = installed(monkeypatch)
    batch, blocks = flash._trial_step(REQUESTS, CPU)
    q = torch.randn(len(batch.tokens), 4, 64, dtype=torch.float16)
    cache = [torch.randn(blocks, 16, shape.kv_heads, 64, dtype=torch.float16) for _ in range(2)]
    wanted = ops.paged_attention(q, *cache, batch, shape)
    with install(monkeypatch):
        there = torch.device("cuda", 0)
        own, _ = flash._trial_step(REQUESTS, there)
        flashed = flash.Flash(sys.modules["flashinfer"], there, [flash.shape_of(shape)])
        own = flashed.begun(own)
        out = attention.paged_attention(q.to(there), *(each.to(there) for each in cache), own, shape).cpu()
    torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)
    assert [name for name, *_ in calls] == ["__init__", "__init__", "plan", "run"]
    q_starts, starts, _, last = (x.tolist() for x in calls[2][1][1:5])
    assert q_starts == [0, 7, 8, 13, 46, 47, 49]
    assert starts == [0, 1, 2, 5, 8, 9, 11] and last == [7, 1, 3, 3, 1, 1]


def test_its_arguments_are_those_of_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = flash_stand_in.real_signatures()
    if real is None:
        pytest.skip("FlashInfer is not installed")
    calls = installed(monkeypatch)
    with install(monkeypatch):
        there = torch.device("cuda", 0)
        assert flash.choose([heads(20, 5.0)], torch.float16, there, 8, None)[0] is not None
    bound = {name: real[name].bind(*args, **named) for name, args, named in calls}
    names = "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk"
    assert list(bound["plan"].arguments)[1:9] == [*names.split(), "page_size"]
    assert list(bound["run"].arguments)[1:3] == ["q", "paged_kv_cache"]


def test_plans_do_not_overtake_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps are planned before the device has begun the first."""
    installed(monkeypatch)
    with install(monkeypatch):
        there = torch.device("cuda", 0)
        flashed = flash.Flash(sys.modules["flashinfer"], there, [flash.shape_of(heads())])
        host = OnHost(np.array([0, 4], np.int32), np.array([4], np.int32), np.zeros((1, 1), np.int32))
        long = OnHost(np.array([0, 20], np.int32), np.array([20], np.int32), np.zeros((1, 2), np.int32))
        for step in (host, long, host, long):
            wrapper = flashed.plan(flash.shape_of(heads()), torch.float16, step)
        torch.cuda.synchronize()
        args = [torch.tensor(x).int().pin_memory() for x in ([0, 4], [0, 1], [0], [4])]
        wrapper.plan(*args, 4, 2, 64, 16, **wrapper.named)
        wrapper.pinned.zero_()  # as a plan right behind would
        with pytest.raises(Forbidden, match="pinned memory"):
            torch.cuda.synchronize()


HALF = {"dtype": "float16", "num_blocks": 24}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Layers of two kinds: one has a window, all cap their scores."""
    write_checkpoint(tmp_path, "gemma2", num_hidden_layers=2, head_dim=64, sliding_window=8)
    return tmp_path


def kernels(calls: flash_stand_in.Calls) -> set[int]:
    return {named["window_left"] for name, _, named in calls if name == "plan"}


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "flashinfer"])
def test_a_model(asked: str | None, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks beside single tokens, with steps launched ahead. `None`: it is faster than an interpreter."""
    with install(monkeypatch):
        wanted = answers(core_of(model, **HALF))
    calls = installed(monkeypatch)
    with install(monkeypatch) as gpu:
        core = core_of(model, **HALF, attention_backend=asked)
        assert executor_of(core).prompts_by.count("FlashInfer for 1 layers of window ") == 2
        calls.clear()
        gpu.waits.clear()
        assert answers(core) == wanted
        assert not gpu.waits, gpu.waits[0]
        assert kernels(calls) == {-1, 7}
        names = [name for name, *_ in calls]
        assert names.count("plan") == names.count("run") >= 4
        core.close()


def slow(_: int) -> None:
    time.sleep(3)


def broken(_: int) -> None:
    raise RuntimeError("ninja: build stopped")


@pytest.mark.parametrize(
    ("faults", "asked", "said"),
    [
        pytest.param({"run": slow}, None, "the own kernel for 1 layers of window None", marks=pytest.mark.slow),
        ({"off": 0.5}, "FLASHINFER", "which differ by"),
        ({"off": float("nan")}, "FLASHINFER", "which differ by inf"),
        ({"plan": broken}, "FLASHINFER", "FlashInfer failed"),
        ({}, "TRITON_ATTN", "the own kernel"),
    ],
    ids=["slower", "wrong", "nothing", "broken", "forbidden"],
)
def test_when_it_is_not_used(
    faults: dict[str, Any], asked: str | None, said: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    calls = installed(monkeypatch, faults)
    with install(monkeypatch):
        there = torch.device("cuda", 0)
        found, words = flash.choose([heads()], torch.float16, there, 8, flash.asked_for(asked))
    assert found is None and said in words
    assert bool(calls) == (asked != "TRITON_ATTN")
    assert ("FlashInfer is installed and not used: RuntimeError: ninja" in caplog.text) == ("plan" in faults)


@pytest.mark.slow
def test_a_failure_in_a_step_leaves_all_to_the_kernels(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with install(monkeypatch):
        wanted = answers(core_of(model, **HALF), tokens=1)
    runs: list[int] = []

    def late(n: int) -> None:
        if ready and not runs.append(n):
            raise RuntimeError("CUDA error: invalid argument")

    ready: list[bool] = []
    installed(monkeypatch, {"run": late})
    with install(monkeypatch):
        core = core_of(model, **HALF, attention_backend="FLASHINFER")
        ready.append(True)
        assert answers(core, tokens=1) == wanted
    assert len(runs) == 1 and caplog.text.count("the own kernel computes prompts from now on") == 1


def test_it_is_asked_for_and_not_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[str], Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flashinfer" else find(name))
    with install(monkeypatch), pytest.raises(ConfigError, match="FlashInfer is not installed"):
        core_of(model, **HALF, attention_backend="FLASHINFER")
    assert flash.asked_for(None) is None and flash.asked_for("FLASH_ATTN") is False
