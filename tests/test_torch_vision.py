"""Vision models in the PyTorch executor on a CPU, against the reference: cut, in graphs, on two ranks, packed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vl_tiny
from packed_checkpoints import Quantized, awq
from safetensors.numpy import load_file, save_file
from torch_models import load, relative
from triton_cases import again
from vl_cases import IMAGES, LIMITS, TOKENS, plan, steps

from pagoda.arch.registry import bind, load_spec
from pagoda.arch.sharding import check_size, share
from pagoda.arch.spec import ModelSpec
from pagoda.backend.reference_vision import ReferenceVision
from pagoda.backend.select import load_executor
from pagoda.backend.torch import ops, vision
from pagoda.backend.torch.executor import TorchCpuExecutor
from pagoda.backend.torch.graphs import DecodeGraphs
from pagoda.backend.torch.split import part
from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Float32, Request, SamplingParams, StepPlan
from pagoda.weights.device_size import tensor_bytes
from pagoda.weights.open import open_source

BOUND = 1e-4
NEXT = [*TOKENS, 50]


@pytest.fixture(scope="module", params=vl_tiny.ALL_KINDS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(vl_tiny.write(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture
def executor(folder: Path) -> TorchCpuExecutor:
    return load(folder)


def reference(folder: Path) -> ReferenceVision:
    source = open_source(str(folder))
    made = load_executor("reference", load_spec(source), source, LIMITS)
    assert isinstance(made, ReferenceVision)
    return made


def seen(executor: TorchCpuExecutor, step: StepPlan) -> Float32:
    """The logits of a step, as the executor computes them."""
    found: list[torch.Tensor] = []
    head = executor.decoder.head
    executor.decoder.head = lambda hidden: found.append(head(hidden)) or found[-1]  # type: ignore[func-returns-value]
    executor.launch(step).wait()
    executor.decoder.head = head
    return torch.cat(found).float().numpy()


def spec_of(executor: TorchCpuExecutor) -> ModelSpec:
    return executor.decoder.spec


def test_vectors_of_images(folder: Path, executor: TorchCpuExecutor) -> None:
    assert executor.decoder.sight is not None
    encoder = reference(folder).encoder
    for image in IMAGES:
        with torch.inference_mode():
            vectors = executor.decoder.sight.encoder.encode(image).numpy()
        assert relative(vectors, encoder.encode(image)) < BOUND


def test_an_image_in_parts_has_the_bits_of_one_go(executor: TorchCpuExecutor) -> None:
    sight = executor.decoder.sight
    assert sight is not None
    with torch.inference_mode():
        whole = sight.encoder.encode(IMAGES[0])
    sight.clear()
    parts = 0
    assert not executor.encoded(IMAGES[0], 0.0)
    while not executor.encoded(IMAGES[0], 1e-9):
        parts += 1
    assert parts > 6 and torch.equal(sight._encoded.vectors(IMAGES[0]), whole)


@pytest.mark.parametrize("cuts", [[], [1, 6, 7, 30]])
def test_logits(folder: Path, executor: TorchCpuExecutor, cuts: list[int]) -> None:
    spec = spec_of(executor)
    whole = reference(folder).logits(plan(spec, TOKENS, 0, len(TOKENS)))
    ours = np.concatenate([seen(executor, step) for step in steps(spec, TOKENS, cuts)])
    assert relative(ours, whole) < BOUND


def test_text_beside_images_has_the_bits_it_has_alone(executor: TorchCpuExecutor) -> None:
    """Positions that are given are rows of the same table."""
    step = plan(spec_of(executor), TOKENS, 0, 5)
    np.testing.assert_array_equal(seen(executor, step), seen(executor, replace(step, rope_positions=None)))


def test_a_step_that_is_too_large_is_cut_through_an_image(folder: Path, executor: TorchCpuExecutor) -> None:
    step = plan(spec_of(executor), TOKENS, 0, len(TOKENS))
    halves = [part(step, 0, 20)[0], part(step, 20, len(TOKENS))[0]]
    assert [len(half.images) for half in halves] == [2, 2]  # the video is in both
    ours = np.concatenate([seen(executor, half) for half in halves])
    assert relative(ours, reference(folder).logits(step)) < BOUND


def test_positions_may_lie_beyond_the_longest_context(folder: Path, executor: TorchCpuExecutor) -> None:
    """A video with few tokens for each second; heads turn by differences, so text that is moved stays what it was."""
    step = plan(spec_of(executor), TOKENS, 0, len(TOKENS))
    assert step.rope_positions is not None and executor.decoder.cos_sin[0].shape[0] == 256
    far = replace(step, rope_positions=step.rope_positions * 11 + 3000)
    theirs = reference(folder).logits(far)
    assert relative(seen(executor, far), theirs) < BOUND
    moved = replace(step, rope_positions=step.rope_positions + 3000)
    assert relative(seen(executor, moved), seen(executor, step)) < 1e-3
    assert relative(theirs, seen(executor, step)) > 1e-2


def test_a_decode_step_behind_images_through_the_fixed_buffers(
    executor: TorchCpuExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(executor)
    for step in steps(spec, TOKENS, [30]):
        executor.launch(step).wait()
    decode = plan(spec, NEXT, len(TOKENS), len(NEXT))
    plain = seen(executor, decode)
    alone = seen(executor, replace(decode, rope_positions=None))
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    made: dict[str, Any] = {"most_requests": 2, "most_context": 256, "device": torch.device("cpu")}
    graphs = DecodeGraphs(executor.decoder.hidden, again, three=True, **made)
    monkeypatch.setattr(executor, "_graphs", graphs)
    for _ in range(2):  # recorded, then replayed
        assert relative(seen(executor, decode), plain) < 2e-3
        assert relative(seen(executor, replace(decode, rope_positions=None)), alone) < 2e-3
    assert relative(alone, plain) > 2e-2  # the positions matter


def generated(folder: Path, size: int) -> list[list[int]]:
    """What a prompt with images and one without get, together, in chunks."""
    config = EngineConfig(
        model=str(folder),
        device="torch-cpu",
        tensor_parallel_size=size,
        num_blocks=40,
        max_num_seqs=2,
        max_num_batched_tokens=24,
        speculation=None,
    )
    core = EngineCore(config)
    params = SamplingParams(max_tokens=8, temperature=0, seed=0, ignore_eos=True)
    core.add(Request(request_id="0", prompt_token_ids=TOKENS, images=IMAGES, params=params))
    core.add(Request(request_id="1", prompt_token_ids=TOKENS[:5], params=params))
    told: dict[str, list[int]] = {"0": [], "1": []}
    try:
        while any(len(tokens) < 8 for tokens in told.values()):
            for delta in core.step():
                assert delta.error is None
                told[delta.request_id] += delta.token_ids
    finally:
        core.close()
    return [told["0"], told["1"]]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_two_ranks_give_the_tokens_of_one(tmp_path: Path, kind: str) -> None:
    vl_tiny.write(tmp_path, kind)
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    tensors = bind(spec, source)
    check_size(spec, tensors, 2)
    first, second = (share(spec, tensors, rank, 2) for rank in range(2))
    assert first[0].vision == spec.vision and second[0].vision is None
    assert not any(slot.startswith("vision.") for slot in second[1])
    assert generated(tmp_path, 2) == generated(tmp_path, 1)


def test_awq_leaves_the_encoder_in_16_bits(tmp_path: Path) -> None:
    table = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    vl_tiny.write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {**table, "modules_to_not_convert": ["visual"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored: dict[str, np.ndarray] = {}
    for name, values in load_file(tmp_path / "model.safetensors").items():
        if name.startswith("visual.") or "_proj.weight" not in name:
            stored[name] = values.astype(np.float16)
            continue
        groups = np.arange(values.shape[1]) // 32
        packed = awq(Quantized(values * 0.6, 4, groups, np.random.default_rng(3)))
        stored |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in packed.items()}
    save_file(stored, tmp_path / "model.safetensors")
    executor = load(tmp_path, dtype="float32")
    step = plan(spec_of(executor), TOKENS, 0, len(TOKENS))
    assert relative(seen(executor, step), reference(tmp_path).logits(step)) < 1e-3


def test_weights_take_what_is_counted(tmp_path: Path) -> None:
    vl_tiny.write(tmp_path)
    executor = load(tmp_path, dtype="bfloat16", quantization="int8")
    sight = executor.decoder.sight
    assert sight is not None and sight.encoder.layers[0].qkv.weight.dtype == torch.bfloat16
    source = open_source(str(tmp_path))
    seeing = {k: t for k, t in bind(load_spec(source), source).items() if k.startswith("vision.")}
    layers = sight.encoder.layers
    products = [p for layer in layers for p in (layer.qkv, layer.o, layer.up, layer.down, layer.gate) if p]
    products += [sight.encoder.patch, sight.encoder.merger.up, sight.encoder.merger.down]
    held = sum(t.nbytes for p in products for t in (p.weight, p.bias) if t is not None)
    norms = [n for layer in layers for n in (layer.attn_norm, layer.mlp_norm)] + [sight.encoder.merger.norm]
    held += sum(n.weight.nbytes for n in norms)
    assert held == sum(tensor_bytes(slot, tensor, "int8", 2) for slot, tensor in seeing.items())


def test_an_image_of_several_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles bound the memory; what comes out is the same."""
    folder = Path(vl_tiny.write(tmp_path))
    sight = load(folder).decoder.sight
    assert sight is not None
    monkeypatch.setattr(vision, "VISION_TILE", 20)
    for image in IMAGES:
        with torch.inference_mode():
            vectors = sight.encoder.encode(image).numpy()
        assert relative(vectors, reference(folder).encoder.encode(image)) < BOUND
