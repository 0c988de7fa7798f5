"""Mixtures of experts in the reference and in PyTorch, against transformers; packed experts; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import EXPERT_CASES, VOCAB, write_checkpoint, write_gguf_experts
from family_cases import write_family
from reference_plans import Feed, make_plan
from safetensors.torch import load_file, save_file
from test_torch_formats import fp8_blocks, taken
from torch_models import PLAN, TOKENS, expected, load, logits, reference, relative

from pagoda.arch.registry import bind, load_spec
from pagoda.backend.torch.convert import Target
from pagoda.backend.torch.model import Mixture
from pagoda.backend.torch.packs import F8, I8, W4
from pagoda.backend.torch.size import weight_bytes
from pagoda.errors import ModelError
from pagoda.weights.open import open_source


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, case)
    exact = expected(model)
    assert relative(reference(tmp_path).logits(PLAN), exact) < 1e-4
    executor = load(tmp_path)
    assert relative(logits(executor, PLAN), exact) < 1e-4
    kinds = [isinstance(layer.mlp, Mixture) for layer in executor.decoder.layers]
    only = [False, True, False] if "qwen3" in case else [True, False, True]
    assert kinds == (only if "there" in case else [True] * 3)


@pytest.mark.parametrize("case", ["qwen3-experts", "qwen2-experts", "mixtral"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gguf_keeps_the_experts_of_a_layer_in_one_tensor(case: str, kind: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, case)
    write_gguf_experts(tmp_path, kind)
    exact = expected(model) if kind == "F32" else reference(tmp_path / "tiny.gguf").logits(PLAN)
    assert relative(logits(load(tmp_path / "tiny.gguf"), PLAN), exact) < 1e-4


@pytest.mark.parametrize("chunk", [1, 16, 23])
def test_chunks_and_company_change_no_bit(chunk: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3-experts")
    executor = load(tmp_path)
    whole = logits(executor, PLAN)[-1]
    for start in range(0, len(TOKENS), chunk):
        part = TOKENS[start : start + chunk]
        feeds = [
            Feed(TOKENS[:5], 0, [12], rows=[(4, -1, -1)]),
            Feed(part, start, [4, 5, 6, 7], rows=[(len(part) - 1, -1, -1)]),
        ]
        last = logits(executor, make_plan(feeds, VOCAB))[1]
    assert np.array_equal(last, whole)


def write_fp8_experts(folder: Path) -> Any:
    """The experts and attention in FP8 blocks; the transformers model with those values is read back from floats."""
    model = write_checkpoint(folder, "qwen3-experts")
    stored = load_file(folder / "model.safetensors")
    exact = dict(stored)
    for name in [n for n in stored if n.endswith("_proj.weight")]:
        codes, scales, exact[name] = fp8_blocks(stored[name], (32, 16))
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
    save_file(exact, folder / "model.safetensors", {"format": "pt"})
    values = type(model).from_pretrained(folder).float().eval()
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    return values


def test_fp8_experts(tmp_path: Path) -> None:
    model = write_fp8_experts(tmp_path)
    executor = load(tmp_path)
    mixture = executor.decoder.layers[0].mlp
    assert isinstance(mixture, Mixture) and isinstance(mixture.down, F8) and mixture.down.codes.shape == (8, 64, 32)
    assert relative(reference(tmp_path).logits(PLAN), expected(model)) < 0.02  # values of 16 bits there
    assert relative(logits(executor, PLAN), expected(model)) < 0.3  # inputs of 8 bits


def write_fp8_stacks(folder: Path) -> Any:
    """Mistral Small 4 as it is published: a scale for each matrix, or for gate and for up, and those of inputs."""
    model = write_family(folder, "mistral4")
    stored = dict(load_file(folder / "model.safetensors"))
    own = model.state_dict()
    for name in [n for n in stored if n.endswith(("_proj.weight", "_proj"))]:
        rows = stored[name].shape[-2]
        size = rows // 2 if "layers.1" in name and "gate_up" in name else rows
        parts = [fp8_blocks(part, (size, 10**6)) for part in stored[name].reshape(-1, *stored[name].shape[-2:])]
        codes, scales, values = (torch.stack(each) for each in zip(*parts, strict=True))
        one, join = (len(parts) == 1, "." if len(parts) == 1 else "_")
        stem = name.removesuffix(".weight")
        stored[name] = codes[0] if one else codes
        stored[name + "_scale_inv"] = scales.reshape(()) if one else scales
        stored[f"{stem}{join}activation_scale"] = torch.tensor(0.02) if one else torch.full((len(parts),), 0.02)
        own[name].copy_(values.reshape(own[name].shape))
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def test_fp8_experts_of_a_layer_in_one_tensor(tmp_path: Path) -> None:
    model = write_fp8_stacks(tmp_path)
    assert relative(reference(tmp_path).logits(PLAN), expected(model)) < 0.02  # values of 16 bits there
    executor = load(tmp_path)
    mixture = executor.decoder.layers[1].mlp
    assert isinstance(mixture, Mixture) and isinstance(mixture.down, F8) and mixture.down.input_scale is not None
    assert relative(logits(executor, PLAN), expected(model)) < 0.3  # inputs of 8 bits


@pytest.mark.parametrize(("asked", "kind"), [("int8", I8), ("int4", W4), ("fp8", F8)])
def test_experts_quantized_on_load(asked: str, kind: type, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3-experts", moe_intermediate_size=64)
    executor = load(tmp_path, quantization=asked)
    mixture = executor.decoder.layers[0].mlp
    assert isinstance(mixture, Mixture) and isinstance(mixture.gate_up[0], kind)
    source = open_source(str(tmp_path))
    bound = bind(load_spec(source), source)
    slots = {slot: bound[slot] for slot in bound if slot.startswith("layers.0.") and slot.endswith("_experts")}
    parts = [taken(part) for part in (*mixture.gate_up, mixture.down)]
    assert weight_bytes(slots, Target(torch.device("cpu"), torch.float32, asked)) == sum(parts)
    error = relative(logits(executor, PLAN), logits(load(tmp_path), PLAN))
    assert 0 < error < (1.5 if asked == "int4" else 0.4)  # a rounded router input may choose another expert


def test_what_is_missing_or_odd_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3-experts")
    stored = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.experts.5.up_proj.weight"
    save_file({n: t for n, t in stored.items() if n != lost}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    with pytest.raises(ModelError, match=f"lacks 1 tensors.*{lost}"):
        bind(load_spec(source), source)
    stored[lost] = stored[lost].half()
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    with pytest.raises(ModelError, match="not all stored alike"):
        bind(load_spec(source), source)
