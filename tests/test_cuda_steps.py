"""Whole models on a stand-in for a GPU: what only runs there gives the tokens of a CPU, and does nothing forbidden."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_tensors
import pytest
import torch
from checkpoints import write_checkpoint
from cuda_stand_in import StandIn, install
from deepseek_cases import write_case

from pagoda.backend.torch import executor, load
from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.executor import TorchExecutor
from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, MemoryShort
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request, SamplingParams

PROMPTS = ([3, 4, 5, 6, 7, 8, 9], [8, 9, 3], [12, 13, 14, 15, 16])
ONE = {"num_hidden_layers": 1}


def core_of(path: Path, device: str = "cuda", **changes: Any) -> EngineCore:
    table = {"num_blocks": 24, "max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 64, "dtype": "float32"}
    return EngineCore(EngineConfig(model=str(path), device=device, speculation=None, **(table | changes)))


def answers(core: EngineCore, cases: list[dict[str, Any]] | None = None, tokens: int = 3) -> list[list[Any]]:
    """The tokens of requests that begin and end at different steps."""
    for i, (prompt, own) in enumerate(zip(PROMPTS, cases or [{}] * len(PROMPTS), strict=True)):
        params = {"temperature": 0.0, "max_tokens": tokens + i, "seed": i, "ignore_eos": True, **own}
        core.add(Request(request_id=str(i), prompt_token_ids=prompt, params=SamplingParams(**params)))
    found: list[list[Any]] = [[] for _ in PROMPTS]
    while core.has_work:
        for delta in core.step():
            assert delta.error is None
            found[int(delta.request_id)] += [delta.token_ids, *(delta.logprobs or [])]
    return found


def rounded(found: list[list[Any]]) -> list[list[Any]]:
    """What is compared of log-probabilities: their tokens, and two digits."""

    def short(entry: Any) -> Any:
        if isinstance(entry, list):
            return entry
        return entry.token_id, round(entry.logprob, 2), [(token, round(value, 2)) for token, value in entry.top]

    return [[short(entry) for entry in own] for own in found]


def executor_of(core: EngineCore) -> TorchExecutor:
    executor = core._executor
    assert isinstance(executor, TorchExecutor)
    return executor


def replays(gpu: StandIn) -> int:
    return sum(graph.replays for graph in gpu.graphs)


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, "qwen3", **ONE)
    return tmp_path


def latent(path: Path) -> None:
    write_case(path, "deepseek_v3")


MODELS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "slow int4": (lambda path: write_checkpoint(path, "qwen3", **ONE), {"quantization": "int4"}),
    "slow int8": (lambda path: write_checkpoint(path, "qwen3", **ONE), {"quantization": "int8"}),
    "slow experts": (lambda path: write_checkpoint(path, "qwen3-experts", **ONE), {}),
    "slow gpt-oss": (lambda path: write_checkpoint(path, "gpt-oss", **ONE), {}),
    "slow gemma": (lambda path: write_checkpoint(path, "gemma2", **ONE), {}),
    "slow hybrid": (lambda path: write_checkpoint(path, "qwen3.5", num_hidden_layers=2, full_attention_interval=2), {}),
    "slow latent": (latent, {}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "slow" in n else n for n in MODELS])
def test_a_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside requests that decode, then steps in graphs of three sizes."""
    write, options = MODELS[name]
    write(tmp_path)
    wanted = answers(core_of(tmp_path, "torch-cpu", **options))
    with install(monkeypatch) as gpu:
        core = core_of(tmp_path, **options)
        gpu.waits.clear()
        assert answers(core) == wanted
        assert not gpu.waits, gpu.waits[0]
        assert len(gpu.graphs) == 3 and replays(gpu) >= 1
        torch.cuda.synchronize()


def test_graphs_that_are_recorded_ahead(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and between requests; the states and caches of those that wait are not touched."""
    cases = [{}, {"temperature": 0.9, "top_p": 0.8}, {"temperature": 0.7, "top_k": 5, "logprobs": 2}]
    wanted = rounded(answers(core_of(floats, "torch-cpu"), cases))
    with install(monkeypatch) as gpu:
        core = core_of(floats)
        while core.prepare():
            pass
        assert len(gpu.graphs) == 3 and not replays(gpu)
        gpu.waits.clear()
        assert rounded(answers(core, cases)) == wanted
        assert not gpu.waits, gpu.waits[0]
        assert len(gpu.graphs) == 3 and replays(gpu) >= 4
        before = gpu.here.allocated
        core.close()
        del core
        torch.cuda.synchronize()
        assert before > 100_000


@pytest.mark.slow
def test_every_way_to_choose_a_token(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "prompt_logprobs": 1},
        {"temperature": 0.8, "min_p": 0.1, "logit_bias": {5: 3.0}},
        {"temperature": 0.8, "top_k": 300, "top_p": 0.9, "allowed_token_ids": tuple(range(3, 90))},
    ]
    wanted = answers(core_of(floats, "torch-cpu"), cases, tokens=2)
    with install(monkeypatch) as gpu:
        core = core_of(floats)
        gpu.waits.clear()
        assert answers(core, cases, tokens=2) == wanted
        assert not gpu.waits, gpu.waits[0]


def test_a_gpu_that_is_not_the_first(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a rank: the threads that load know nothing of the choice of the one that computes."""
    wanted = answers(core_of(floats, "torch-cpu"), tokens=1)
    with install(monkeypatch, gpus=2) as gpu:
        torch.cuda.set_device(1)
        core = core_of(floats)
        assert answers(core, tokens=1) == wanted
        torch.cuda.synchronize()
        assert gpu.gpus[1].allocated and not gpu.gpus[0].peak


@pytest.mark.slow
def test_a_step_without_memory_is_cut(floats: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    wanted = answers(core_of(floats, "torch-cpu"))
    with install(monkeypatch) as gpu:
        core = core_of(floats)
        own = executor_of(core)
        here, hidden = gpu.here, own.hidden

        def scarce(batch: Batch) -> torch.Tensor:
            here.held_bytes = here.total_bytes - here.allocated - 4096 if len(batch.tokens) > 5 else 0
            try:
                return hidden(batch)
            finally:
                here.held_bytes = 0

        monkeypatch.setattr(own, "hidden", scarce)
        assert answers(core) == wanted
        assert own._most_tokens == 4 and "no memory for a step of 8 tokens" in caplog.text


@pytest.mark.slow
def test_without_memory_for_a_graph_steps_go_on(floats: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    wanted = answers(core_of(floats, "torch-cpu"))

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    with install(monkeypatch) as gpu:
        monkeypatch.setattr(cuda_tensors.Graph, "capture_begin", full)
        assert answers(core_of(floats)) == wanted
        assert not replays(gpu) and "no memory for a CUDA graph of 4 requests" in caplog.text


def test_where_graphs_cannot_be_recorded_steps_go_on(
    floats: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """What a device says that has no such graphs comes at the end of the first recording; there is no second one."""
    wanted = answers(core_of(floats, "torch-cpu"), tokens=1)
    end = cuda_tensors.Graph.capture_end

    def refused(self: Any) -> None:
        end(self)
        raise torch.AcceleratorError("operation failed due to a previous error during capture")

    with install(monkeypatch) as gpu:
        monkeypatch.setattr(cuda_tensors.Graph, "capture_end", refused)
        core = core_of(floats)
        assert answers(core, tokens=1) == wanted
        assert len(gpu.graphs) == 1 and not core.prepare()
        assert "was not recorded" in caplog.text and gpu.stream is None


@pytest.mark.slow
def test_the_cache_takes_what_is_left(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = 2 << 20
    with install(monkeypatch, total_bytes=total) as gpu:
        core = core_of(floats, num_blocks=None, max_num_seqs=8, max_model_len=256, memory_share=0.5)
        capacity = executor_of(core).capacity
        assert capacity.device.startswith("cuda (Stand-in, float32)")
        whole = capacity.weight_bytes + capacity.kv_bytes + capacity.activation_bytes
        assert 0.45 * total < whole <= 0.5 * total
        answers(core)
        assert gpu.here.peak <= 0.5 * total
        core.close()
    with install(monkeypatch, total_bytes=total) as gpu:
        gpu.here.held_bytes = total * 7 // 16
        with pytest.raises(MemoryShort, match=r"0\.9 MiB are held by .*the driver"):
            core_of(floats, num_blocks=None, memory_share=0.5)


def test_a_smaller_trial_step_may_have_the_longest_prompt(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """140 tokens are 14 for the first of 19 requests, and 35 are 17."""
    with install(monkeypatch):
        core = core_of(floats, num_blocks=None, max_num_batched_tokens=140, max_num_seqs=19, enforce_eager=True)
        core.close()


def test_what_libraries_hold_is_not_for_the_cache(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL and compiled programs take memory that PyTorch does not know, once they are first used."""
    table: dict[str, Any] = {"num_blocks": None, "max_num_seqs": 8, "max_model_len": 256, "memory_share": 0.5}
    found = []
    for own in (0, 1 << 16):
        with install(monkeypatch, total_bytes=2 << 20) as gpu:
            choose = executor.choose

            def first(*args: Any, gpu: StandIn = gpu, own: int = own, choose: Any = choose) -> Any:
                gpu.here.held_bytes = own
                return choose(*args)

            monkeypatch.setattr(executor, "choose", first)
            found.append(executor_of(core_of(floats, **table)).capacity)
            monkeypatch.setattr(executor, "choose", choose)
    assert found[1].activation_bytes - found[0].activation_bytes == 1 << 16
    assert found[1].kv_bytes + (1 << 16) == pytest.approx(found[0].kv_bytes, abs=1 << 14)


def test_memory_that_runs_out_while_a_model_is_loaded(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with install(monkeypatch) as gpu:
        send = load.Converter.send

        def taken(self: Any, data: Any) -> Any:
            gpu.here.held_bytes = gpu.here.total_bytes - gpu.here.allocated - 8192
            return send(self, data)

        monkeypatch.setattr(load.Converter, "send", taken)
        with pytest.raises(MemoryShort, match="ran out while the model was loaded"):
            core_of(floats)


def test_a_gpu_that_does_not_compute(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")

    with install(monkeypatch) as gpu:
        monkeypatch.setattr(gpu, "wait", refused)
        with pytest.raises(ConfigError, match=r"Stand-in does not compute: .* no kernel image .* made for sm_90"):
            core_of(floats)


def test_a_fault_of_the_gpu_ends_the_engine(floats: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Triton says it in its own words; the device is asked whether it still works."""
    with install(monkeypatch):
        core = core_of(floats)
        own = executor_of(core)

        def fault(*_: Any) -> None:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

        monkeypatch.setattr(own, "hidden", fault)
        core.add(Request(request_id="0", prompt_token_ids=[3], params=SamplingParams(seed=0)))
        assert [delta.error for delta in core.step()] == ["the step failed"]
        monkeypatch.setattr(torch.cuda, "synchronize", fault)
        core.add(Request(request_id="1", prompt_token_ids=[3], params=SamplingParams(seed=0)))
        with caplog.at_level(logging.CRITICAL), pytest.raises(SystemExit):
            core.step()
        assert "broke the GPU's context" in caplog.text
