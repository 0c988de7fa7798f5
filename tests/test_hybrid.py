"""Hybrids with a gated delta net (Qwen3-Next, Qwen3.5): each executor and the engine, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import HYBRID_CASES, VOCAB, write_checkpoint
from hybrid_gguf import write_hybrid
from reference_plans import Feed, make_plan
from safetensors.torch import save_file
from test_gpt2 import logits
from test_reference_models import generate, greedy

from pagoda.arch import memory
from pagoda.arch.registry import bind, load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.reference import ReferenceExecutor
from pagoda.backend.torch import ops
from pagoda.backend.torch.executor import TorchCpuExecutor
from pagoda.backend.torch.graphs import DecodeGraphs
from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, MemoryShort
from pagoda.options.engine_config import EngineConfig
from pagoda.options.speculation import Speculation
from pagoda.types import Float32, Request, SamplingParams
from pagoda.weights.open import open_source

LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128, num_blocks=32)
TOKENS: list[int] = np.random.default_rng(0).integers(3, VOCAB, 45).tolist()
DEVICES = {"reference": ReferenceExecutor, "cpu": CpuExecutor, "torch-cpu": TorchCpuExecutor}
BOUNDS = {"reference": 1e-4, "cpu": 2e-3, "torch-cpu": 1e-4}  # the CPU's cache is of 16 bits
# A short prompt ends within the first window of the convolution.
SHORT = TOKENS[:2]


@pytest.fixture(scope="module", params=HYBRID_CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("hybrid")
    return path, write_checkpoint(path, request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("dense")
    return path, write_checkpoint(path, "qwen3.5")


def load(path: Path, device: str, **limits: Any) -> Any:
    source = open_source(str(path))
    return DEVICES[device].load(load_spec(source), source, replace(LIMITS, **limits))


def last(tokens: list[int], position: int = 0, blocks: tuple[int, ...] = (0, 1, 2, 3)) -> Feed:
    """A feed that wants logits after its last token."""
    return Feed(tokens, position, blocks, rows=[(len(tokens) - 1, -1, -1)])


def alone(path: Path, device: str, tokens: list[int], **limits: Any) -> Float32:
    return logits(load(path, device, **limits), make_plan([last(tokens)], VOCAB))[0]


@pytest.mark.parametrize("device", DEVICES)
def test_logits_equal_transformers(device: str, case: tuple[Path, Any]) -> None:
    path, model = case
    rows = [(i, -1, -1) for i in range(len(TOKENS))]
    found = logits(load(path, device), make_plan([Feed(TOKENS, blocks=[9, 2, 5], rows=rows)], VOCAB))
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(found - expected).max() < BOUNDS[device] * np.abs(expected).max()


@pytest.mark.parametrize("device", DEVICES)
def test_logits_of_gguf(device: str, case: tuple[Path, Any], tmp_path: Path) -> None:
    """The same as of the other format, and quantized near what the weights say."""
    path, model = case
    file = tmp_path / "tiny.gguf"
    write_hybrid(file, model)
    found, expected = alone(file, device, TOKENS), alone(path, "reference", TOKENS)
    assert np.abs(found - expected).max() < BOUNDS[device] * np.abs(expected).max()
    if not hasattr(model.config, "num_experts"):  # by rounded numbers a router chooses others
        write_hybrid(file, model, "Q8_0")
        found, expected = alone(file, device, TOKENS), alone(file, "reference", TOKENS)
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 2, 16, 31])
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(device: str, chunk: int, dense: tuple[Path, Any]) -> None:
    executor = load(dense[0], device)
    for start in range(0, len(TOKENS), chunk):
        found = logits(executor, make_plan([last(TOKENS[start : start + chunk], start)], VOCAB))
    assert np.array_equal(found[0], alone(dense[0], device, TOKENS))


@pytest.mark.parametrize("device", DEVICES)
def test_company_and_what_a_slot_held_before_change_no_bit(device: str, case: tuple[Path, Any]) -> None:
    # PyTorch's product for one output, the gate of the shared expert, goes by a row's place among others on a CPU
    exact = device != "torch-cpu" or not hasattr(case[1].config, "num_experts")
    check_company(case[0], device, 0 if exact else 1e-3)


def check_company(path: Path, device: str, atol: float = 0) -> None:
    """Slots out of order; the second request goes on while others begin, one of them in a slot that was used."""
    executor = load(path, device)
    first, second, third = TOKENS[:30], TOKENS[10:37], SHORT
    logits(executor, make_plan([last(first[::-1], 0, (8, 9)), last(second[:-1], 0, (4, 5))], VOCAB, slots=[3, 1]))
    feeds = [last(first, 0, (2, 7)), last(second[-1:], len(second) - 1, (4, 5)), last(third, 0, (6,))]
    together = logits(executor, make_plan(feeds, VOCAB, slots=[3, 1, 0]))
    for found, tokens in zip(together, (first, second, third), strict=True):
        np.testing.assert_allclose(found, alone(path, device, tokens), rtol=0, atol=atol)


def core(path: Path, device: str, **options: Any) -> EngineCore:
    return EngineCore(
        EngineConfig(model=str(path), device=device, **{"max_model_len": 256, "num_blocks": 32, **options})
    )


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_text_equals_transformers(device: str, dense: tuple[Path, Any]) -> None:
    path, model = dense
    assert generate(core(path, device), TOKENS[:20], 16) == greedy(model, TOKENS[:20], 16)


def answers(engine: EngineCore, prompts: list[list[int]], known: list[int] | None = None) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.8, seed=i, max_tokens=40, ignore_eos=True)
        engine.add(
            Request(request_id=str(i), prompt_token_ids=prompt, params=params, output_token_ids=list(known or ()))
        )
        out[str(i)] = list(known or ())
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None
            out[delta.request_id] += delta.token_ids
    return out


@pytest.mark.parametrize("device", DEVICES)
def test_preemption_and_a_restart_change_no_token(device: str, dense: tuple[Path, Any]) -> None:
    """With few blocks requests are put back, and go on behind the last state that was kept."""
    prompts = [TOKENS[:32] + TOKENS[i : i + 5] for i in range(3)]
    expected = answers(core(dense[0], device), prompts[:1])["0"]
    engine = core(dense[0], device, max_model_len=96, num_blocks=11, max_num_batched_tokens=24, max_num_seqs=3)
    together = answers(engine, prompts)
    stats = engine.stats().scheduler
    assert stats.preemptions > 0
    assert together["0"] == expected
    assert answers(core(dense[0], device), prompts[:1], known=expected[:17])["0"] == expected


def test_the_state_is_part_of_the_memory(dense: tuple[Path, Any]) -> None:
    source = open_source(str(dense[0]))
    spec = load_spec(source)
    delta = spec.layers[0].delta
    assert delta is not None and spec.layers[3].delta is None
    assert memory.state_bytes(spec) == 3 * 4 * (3 * (2 * 64 + 64) + 4 * 32 * 16)
    assert memory.kv_bytes_per_block(spec, "float32") == 2 * 2 * 32 * 16 * 4  # of one layer of four
    executor = load(dense[0], "reference")
    assert executor.capacity.kv_bytes == 4 * memory.state_bytes(spec) + 32 * memory.kv_bytes_per_block(spec, "float32")
    with pytest.raises(MemoryShort, match="the states of 1000000 requests") as error:
        load(dense[0], "reference", max_num_seqs=1_000_000)
    assert "--max-num-seqs" in str(error.value.remedy)


def test_as_many_requests_as_have_room_where_nobody_says(dense: tuple[Path, Any]) -> None:
    spec = load_spec(open_source(str(dense[0])))
    assert memory.usual_requests(spec, 64) == 64
    assert spec.layers[0].delta is not None
    delta = msgspec.structs.replace(spec.layers[0].delta, key_dim=2**14, value_dim=2**13)
    large = replace(spec, layers=(replace(spec.layers[0], delta=delta),))
    assert memory.usual_requests(large, 64) == 1


def test_drafts_are_refused(dense: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be taken back"):
        core(dense[0], "reference", speculation=Speculation(always=True))


def renamed(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as a checkpoint that sees has them: the language model inside, with the experts of a layer as one."""
    for name, tensor in model.state_dict().items():
        yield name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name, tensor.clone()


def test_a_checkpoint_that_sees_gives_its_language_model(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen3.5-experts")
    config = json.loads((tmp_path / "config.json").read_text())
    expected = alone(tmp_path, "reference", TOKENS)
    recipe = {**config["rope_parameters"], "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    inner = {**config, "rope_parameters": recipe}
    outer = {"model_type": "qwen3_5_moe", "text_config": inner, "vision_config": {}, "image_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    others = {"mtp.fc.weight": torch.zeros(4, 4), "model.visual.patch_embed.proj.weight": torch.zeros(4, 4)}
    save_file(dict(renamed(model)) | others, tmp_path / "model.safetensors")
    assert np.array_equal(alone(tmp_path, "reference", TOKENS), expected)
    spec = load_spec(open_source(str(tmp_path)))
    assert spec.model_type == "qwen3_5_moe" and spec.vision is None and spec.eos_token_ids == (2,)
    assert set(bind(spec, open_source(str(tmp_path)))) == set(spec.slots())


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_on_load(quantization: str, case: tuple[Path, Any]) -> None:
    """What the kernels make of rounded weights has the same bits in chunks, and without a router is near the exact."""
    executor = load(case[0], "cpu", quantization=quantization)
    found = [logits(executor, make_plan([last(TOKENS[at : at + 20], at)], VOCAB)) for at in range(0, 45, 20)][-1][0]
    assert np.array_equal(found, alone(case[0], "cpu", TOKENS, quantization=quantization))
    if not hasattr(case[1].config, "num_experts"):
        expected = alone(case[0], "reference", TOKENS)
        bound = {"int8": 0.1, "int4": 0.6}[quantization]
        assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


def test_two_ranks(tmp_path: Path) -> None:
    """Answers of two processes that share the heads of the delta nets too."""
    write_checkpoint(tmp_path, "qwen3-next")
    check_two_ranks(tmp_path)


def check_two_ranks(path: Path) -> None:
    prompts = [TOKENS[:20], TOKENS[5:30]]
    expected = answers(core(path, "torch-cpu", dtype="float32"), prompts)
    engine = core(path, "torch-cpu", dtype="float32", tensor_parallel_size=2)
    together = answers(engine, prompts)
    engine.close()
    assert together == expected


def test_the_kernels_and_the_fixed_buffers_of_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "qwen3.5", num_hidden_layers=2, full_attention_interval=2)
    check_kernels(tmp_path, monkeypatch)


def check_kernels(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, parts of them that go on, and single tokens in a padded batch."""
    plain, fused = (load(path, "torch-cpu") for _ in range(2))
    lengths, places, plans = (5, 2, 1), [2, 0, 3], []
    for count, done in ((lengths, (0, 0, 0)), ((3, 1, 2), lengths), ((1, 1, 1), (8, 3, 3)), ((1, 1, 1), (9, 4, 4))):
        feeds = [last(TOKENS[at : at + n], at, (5 - r,)) for r, (n, at) in enumerate(zip(count, done, strict=True))]
        plans.append(make_plan(feeds, VOCAB, slots=places))
    expected = [logits(plain, plan) for plan in plans]

    def recorded(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """Stands for a recording where there is no GPU, which moves no state."""
        before = [(first.clone(), second.clone()) for first, second in fused.decoder.caches]
        result = run()
        for cache, old in zip(fused.decoder.caches, before, strict=True):
            cache[0].copy_(old[0])
            cache[1].copy_(old[1])
        return lambda: result.copy_(run()), result

    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    graphs = DecodeGraphs(fused.decoder.hidden, recorded, most_requests=5, most_context=256, device=torch.device("cpu"))
    monkeypatch.setattr(fused, "_graphs", graphs)
    for plan, wanted in zip(plans, expected, strict=True):
        assert np.abs(logits(fused, plan) - wanted).max() < 2e-3 * np.abs(wanted).max()
