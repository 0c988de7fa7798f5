"""Quantized weights in the PyTorch executor: the numbers they stand for, the bytes they take, whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_model, write_checkpoint, write_gguf_checkpoint
from gguf_quants import encode
from packed_checkpoints import write
from safetensors.torch import save_file
from test_formats_packed import TABLES
from torch_models import PLAN, expected, load, logits, reference, relative

from pagoda.arch.registry import bind, load_spec
from pagoda.backend.torch import ops
from pagoda.backend.torch.convert import Converter, Target, make_f8, make_i8, make_w4, make_w8
from pagoda.backend.torch.packs import F8, I8, M4, W4, W8, Dense
from pagoda.backend.torch.size import weight_bytes
from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.weights.device_size import FORMS
from pagoda.weights.fp8 import e4m3_values
from pagoda.weights.ggml import dequantize
from pagoda.weights.open import open_source
from pagoda.weights.quantization import check_quantization
from pagoda.weights.source import Tensor

TARGET = Target(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", TABLES)
def test_awq_and_gptq_keep_their_bits_and_their_numbers(name: str, tmp_path: Path) -> None:
    model = write(tmp_path, "llama", TABLES[name])
    executor = load(tmp_path)
    bits, ordered = TABLES[name]["bits"], bool(TABLES[name].get("desc_act"))
    down = executor.decoder.layers[1].mlp.down.parts[0]
    assert isinstance(down, W4 if bits == 4 else W8) and (down.order is not None) == ordered
    values = down.floats()
    if down.order is not None:
        values = values[:, torch.argsort(down.order)]
    assert torch.equal(values, model.model.layers[1].mlp.down_proj.weight)
    assert len(executor.decoder.layers[0].qkv.parts) == 1
    assert relative(logits(executor, PLAN), expected(model)) < 1e-4


@pytest.mark.parametrize("kind", sorted(FORMS))
def test_gguf_blocks_keep_their_numbers(kind: str) -> None:
    values = (np.random.default_rng(1).standard_normal((24, 512)) * 0.05).astype(np.float32)
    values[3, :256] = 0.25
    values[4] = 0
    stored = Tensor("w", values.shape, kind, encode(values, kind))
    weight = Converter(TARGET).weight(stored)
    assert isinstance(weight, M4 if kind == "MXFP4" else W4 if FORMS[kind][0] == 4 else W8)
    np.testing.assert_allclose(weight.floats().numpy(), dequantize(stored), rtol=1e-5, atol=2e-6)
    assert weight_bytes({"layers.0.o": stored}, TARGET) == taken(weight)


def taken(weight: Any) -> int:
    """Bytes of a weight on the device."""
    tensors = [getattr(weight, name) for name in weight.__slots__]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1", "Q5_1"])
def test_gguf_models_equal_the_reference(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf_checkpoint(path, make_model("qwen3"), kind)
    assert relative(logits(load(path), PLAN), reference(path).logits(PLAN)) < 1e-4


def write_fp8(folder: Path, how: str, width: int = 192) -> Any:
    """A tiny model, its linear layers in FP8 as `how` says; returns the transformers model with those values."""
    model = make_model("qwen3", hidden_size=128, intermediate_size=width, num_hidden_layers=2)
    stored: dict[str, torch.Tensor] = {}
    size = {"block": (64, 32), "channel": (1, 10**6), "tensor": (10**6, 10**6), "static": (10**6, 10**6)}[how]
    scale_name = "weight_scale_inv" if how == "block" else "weight_scale"
    for name, weight in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight.contiguous()
            continue
        codes, scales, values = fp8_blocks(weight * 0.6, size)
        stored[name], stored[name.replace("weight", scale_name)] = codes, scales if how != "tensor" else scales[0, 0]
        if how == "static":
            stored[name.replace("weight", "input_scale")] = torch.tensor([0.02])
        with torch.no_grad():
            weight.copy_(values)
    save_file(stored, folder / "model.safetensors")
    group = {"weights": {"type": "float", "num_bits": 8, "strategy": how}}
    table: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    if how == "block":
        table = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(size)}
    config = {**model.config.to_dict(), "quantization_config": table}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return model


def fp8_blocks(weight: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and values of a matrix, block by block."""
    codes, values, rows = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight), []
    for r in range(0, weight.shape[0], size[0]):
        rows.append([])
        for c in range(0, weight.shape[1], size[1]):
            place = slice(r, r + size[0]), slice(c, c + size[1])
            scale = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scale).to(torch.float8_e4m3fn)
            values[place] = codes[place].float() * scale
            rows[-1].append(scale)
    return codes, torch.tensor(rows), values


@pytest.mark.parametrize("how", ["tensor", "channel", "block", "static"])
def test_fp8_checkpoints(how: str, tmp_path: Path) -> None:
    model = write_fp8(tmp_path, how)
    source = open_source(str(tmp_path))
    for tensor in bind(load_spec(source), source).values():
        exact = model.state_dict()[tensor.name].to(torch.bfloat16 if "_proj" in tensor.name else torch.float32)
        assert np.array_equal(dequantize(tensor), exact.float().numpy()), tensor.name
    executor = load(tmp_path)
    down = executor.decoder.layers[0].mlp.down.parts[0]
    assert isinstance(down, F8) and (down.input_scale is not None) == (how == "static")
    assert torch.equal(down.floats(), model.model.layers[0].mlp.down_proj.weight)
    assert len(executor.decoder.layers[0].mlp.gate_up.parts) == 1
    # inputs are rounded to FP8 too, here; they are not where the device has no FP8
    assert 0.005 < relative(logits(executor, PLAN), expected(model)) < 0.25
    for layer in executor.decoder.layers:
        for linear in (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down):
            object.__setattr__(linear.parts[0], "quantize_input", False)
    assert relative(logits(executor, PLAN), expected(model)) < 1e-4
    check_quantization(source, "fp8")


def test_what_is_no_fp8_is_refused(tmp_path: Path) -> None:
    write_fp8(tmp_path, "block")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"fmt": "e5m2"}, "e5m2"),
        ({"weight_block_size": [128]}, "no size"),
        ({"weight_block_size": None}, "scales"),
        ({"quant_method": "compressed-tensors"}, "not FP8"),
    ):
        table = {**config["quantization_config"], **change}
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": table}))
        with pytest.raises(ModelError, match=words):
            open_source(str(tmp_path))


def test_the_values_of_e4m3() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(codes, e4m3_values(), equal_nan=True)


@pytest.mark.parametrize(("asked", "kind", "error"), [("int8", I8, 0.008), ("int4", W4, 0.1), ("fp8", F8, 0.03)])
def test_quantizing_on_load(asked: str, kind: type, error: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", hidden_size=128, intermediate_size=256)
    whole, small = load(tmp_path), load(tmp_path, quantization=asked)
    layer, exact = small.decoder.layers[0], whole.decoder.layers[0]
    assert isinstance(layer.qkv.parts[0], kind) and isinstance(small.decoder.head.parts[0], Dense)
    assert [type(part) for part in layer.qkv.parts] == ([W4, W8] if asked == "int4" else [kind])
    values, floats = torch.cat([part.floats() for part in layer.qkv.parts]), exact.qkv.parts[0].floats()
    assert 0 < relative(values.numpy(), floats.numpy()) < error
    source = open_source(str(tmp_path))
    target = Target(torch.device("cpu"), torch.float32, asked)
    assert small.capacity.weight_bytes == weight_bytes(bind(load_spec(source), source), target)
    linears = [n for each in small.decoder.layers for n in (each.qkv, each.o, each.mlp.gate_up, each.mlp.down)]
    floats_left = sum(t.nbytes for t in (small.decoder.embed.data, small.decoder.head.parts[0].data))
    norms = 4 * 128 * (2 * len(small.decoder.layers) + 1)
    assert small.capacity.weight_bytes == sum(taken(p) for n in linears for p in n.parts) + floats_left + norms
    assert relative(logits(small, PLAN), logits(whole, PLAN)) < 25 * error


def test_int8_products_are_exact_sums() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(5, 64, generator=generator), make_i8(torch.randn(24, 64, generator=generator))
    codes, scale = ops.quantize_rows(x)
    exact = (codes.long() @ weight.codes.long().t()).float() * scale * weight.scales
    assert torch.equal(ops.matmul(x, weight), exact)
    assert torch.equal(ops.matmul(x[2:3], weight), exact[2:3])


def test_values_at_the_ends_of_a_group() -> None:
    values = torch.linspace(-3, 1, 64).repeat(2, 1)
    assert (make_w4(values, torch.float32).floats() - values).abs().max() <= 4 / 15
    assert torch.equal(make_f8(values, True).floats()[:, 0], torch.full((2,), -3.0))
    alike = torch.tensor([[0.0], [-0.25], [3.0]]).repeat(1, 64) + torch.tensor([0.0, 1e-6]).repeat(32)
    for kind in (torch.float32, torch.float16):
        assert (make_w4(alike, kind).floats() - alike).abs().max() < 2e-3 * (kind == torch.float16) + 2e-6


def test_the_line_that_fits_is_better_than_the_span_of_a_group() -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(5)) * 0.05
    grouped = torch.unflatten(values, -1, (-1, 32))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = ((grouped - low) / step).round() * step + low
    fitted = torch.unflatten(make_w4(values, torch.float16).floats(), -1, (-1, 32))
    before, after = ((each - grouped).square().sum(-1) for each in (plain, fitted))
    assert after.mean() < 0.9 * before.mean() and (after <= before * 1.01).all()
    assert relative(make_w8(values, torch.float16).floats().numpy(), values.numpy()) < 0.006


def test_fp8_on_load_needs_a_gpu(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"on a GPU only.*int8 or int4"):
        EngineCore(EngineConfig(model=str(tmp_path), device="cpu", quantization="fp8"))
    core = EngineCore(EngineConfig(model=str(tmp_path), device="torch-cpu", quantization="fp8", num_blocks=32))
    assert core.info.weight_types == "F32 as fp8"
