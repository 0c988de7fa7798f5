"""AWQ and GPTQ checkpoints: every stored number exactly, and whole models against transformers in floats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import VOCAB
from packed_checkpoints import write
from reference_plans import Feed, make_plan
from safetensors.torch import load_file, save_file

from pagoda.arch.registry import bind, load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor, weight_bytes
from pagoda.backend.cpu.panels import in_their_order
from pagoda.backend.reference import ReferenceExecutor
from pagoda.errors import ConfigError, ModelError
from pagoda.weights.files import drop_pages
from pagoda.weights.ggml import dequantize
from pagoda.weights.gptq import gptq_tensors
from pagoda.weights.open import open_source
from pagoda.weights.quantization import check_quantization
from pagoda.weights.safetensors import read_shard

torch = pytest.importorskip("torch")
LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128, num_blocks=32)
TOKENS = np.random.default_rng(0).integers(3, VOCAB, 60).tolist()
PLAN = make_plan([Feed(tokens=TOKENS, blocks=range(8), rows=[(i, -1, -1) for i in range(len(TOKENS))])], VOCAB)

Written = Callable[[str, tuple[str, ...]], Path]
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False}
TABLES: dict[str, dict[str, Any]] = {
    "awq-32": {**AWQ, "group_size": 32},
    "awq-128": {**AWQ, "group_size": 128},
    "awq-row": {**AWQ, "group_size": -1},
    "gptq-32": {**GPTQ, "group_size": 32},
    "gptq-128": {**GPTQ, "group_size": 128, "sym": True},
    "gptq-row": {**GPTQ, "group_size": -1},
    "gptq-v2": {**GPTQ, "group_size": 64, "checkpoint_format": "gptq_v2"},
    "gptq-8": {**GPTQ, "bits": 8, "group_size": 32},
    "gptq-8-symmetric": {**GPTQ, "bits": 8, "group_size": 64, "sym": True},
    "gptq-order": {**GPTQ, "group_size": 32, "desc_act": True},
    "gptq-8-order": {**GPTQ, "bits": 8, "group_size": 64, "desc_act": True},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The folder of a packed model, without some of its parts: made once, to be copied."""

    @cache
    def make(name: str, drop: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("packed")
        write(folder, "llama", TABLES[name], drop=drop)
        return folder

    return make


@pytest.mark.parametrize("name", TABLES)
def test_packed_models_are_the_float_models_they_stand_for(name: str, tmp_path: Path) -> None:
    model = write(tmp_path, "llama", TABLES[name])
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    bound = bind(spec, source)
    values = dict(model.state_dict())
    kinds = set()
    for tensor in bound.values():
        assert np.array_equal(dequantize(tensor), values[tensor.name].numpy()), tensor.name
        if "_proj" in tensor.name:
            kinds.add(tensor.type)
    order, bits = TABLES[name].get("desc_act"), TABLES[name]["bits"]
    assert kinds == {"F32" if order else f"U{bits}G"}

    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    reference = ReferenceExecutor.load(spec, source, LIMITS).logits(PLAN)
    assert np.abs(reference - expected).max() < 1e-3 * np.abs(expected).max()
    executor = CpuExecutor.load(spec, source, LIMITS)
    native = np.zeros((len(TOKENS), VOCAB), np.float32)
    executor._lib.run(PLAN, native)
    vectors = sum(tensor.shape[0] * 4 + 32 for tensor in bound.values() if len(tensor.shape) == 1)
    assert 0 <= executor.capacity.weight_bytes - weight_bytes(bound) <= vectors
    executor.close()
    error = float(np.sqrt(((native - expected) ** 2).mean() / (expected**2).mean()))
    assert error < 0.04  # 8-bit activations, amplified by random layers
    packed = sum(bits / 8 * np.prod(t.shape) for t in bound.values() if "_proj" in t.name)
    whole = sum(4 * np.prod(t.shape) for t in bound.values() if "_proj" not in t.name)
    assert executor.capacity.weight_bytes < 1.25 * packed + whole + vectors


def test_an_order_that_a_product_does_not_share_costs_room_only(tmp_path: Path) -> None:
    model = write(tmp_path, "llama", TABLES["gptq-order"], one_order=False)
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    bound = bind(spec, source)
    packed, orders = in_their_order(bound)
    assert set(orders) == {f"layers.{i}.{product}" for i in range(2) for product in ("o", "down")}
    assert {slot.rpartition(".")[2] for slot, t in packed.items() if t.type == "U4G"} == {"o", "down"}
    executor = CpuExecutor.load(spec, source, LIMITS)
    native = np.zeros((len(TOKENS), VOCAB), np.float32)
    executor._lib.run(PLAN, native)
    executor.close()
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.sqrt(((native - expected) ** 2).mean() / (expected**2).mean()) < 0.04


def test_the_input_of_a_shared_expert_keeps_its_order_since_the_router_reads_it_too(tmp_path: Path) -> None:
    write(tmp_path, "llama", TABLES["gptq-order"])
    source = open_source(str(tmp_path))
    bound, p = bind(load_spec(source), source), "layers.0."
    slots = {p + name: bound[p + name] for name in ("attn_norm", "gate", "up")}
    assert list(in_their_order(slots)[1]) == [p + "gate_up"]
    slots = {p + "attn_norm": slots[p + "attn_norm"], p + "router": bound["embed"]}
    slots |= {p + "gate_shared": bound[p + "gate"], p + "up_shared": bound[p + "up"]}
    stored, orders = in_their_order(slots)
    assert not orders and stored[p + "gate_shared"].type == "F32"


def test_a_matrix_is_converted_when_it_is_read_and_not_kept(tmp_path: Path) -> None:
    write(tmp_path, "llama", TABLES["awq-128"])
    tensor = open_source(str(tmp_path)).tensors["model.layers.0.mlp.down_proj.weight"]
    assert (tensor.type, tensor.shape, tensor.nbytes) == ("U4G", (128, 256), 128 * 8 * 19)
    assert tensor.data is not tensor.data and np.array_equal(tensor.data, tensor.data)
    assert tensor.data.nbytes == tensor.nbytes


@pytest.mark.parametrize("order", [False, True])
def test_an_original_does_not_stay_in_memory(order: bool, tmp_path: Path) -> None:
    write(tmp_path, "llama", TABLES["gptq-32"])
    inputs, outputs, file = 2048, 8192, tmp_path / "large.safetensors"
    rng = np.random.default_rng(3)
    group_of = (np.arange(inputs) // 32).astype(np.int32)
    tensors = {
        "x.qweight": rng.integers(0, 1 << 31, (inputs // 8, outputs), np.int32),
        "x.qzeros": np.zeros((inputs // 32, outputs // 8), np.int32),
        "x.scales": np.ones((inputs // 32, outputs), np.float16),
        "x.g_idx": rng.permutation(group_of) if order else group_of,
    }
    save_file({name: torch.from_numpy(data) for name, data in tensors.items()}, file)
    stored = read_shard(file)
    matrix = gptq_tensors(str(file), TABLES["gptq-32"], stored)["x.weight"]
    assert matrix.data.size and resident_bytes(file) > 8e6
    drop_pages([matrix])
    assert resident_bytes(file) < 100_000


def test_of_a_loaded_model_no_original_stays_in_memory(tmp_path: Path) -> None:
    write(tmp_path, "llama", TABLES["gptq-order"])
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    file = tmp_path / "model.safetensors"
    assert all(tensor.data.size for tensor in source.tensors.values()) and resident_bytes(file) > 0
    executor = CpuExecutor.load(spec, source, LIMITS)
    assert resident_bytes(file) == 0
    executor.close()


def resident_bytes(file: Path) -> int:
    """Of this file, in this process; it must be mapped."""
    maps = Path("/proc/self/smaps").read_text().split(f" {file}\n")
    assert len(maps) > 1
    return sum(int(part.split("Rss:")[1].split()[0]) * 1024 for part in maps[1:])


def test_scales_in_bfloat16_stay_exact(tmp_path: Path) -> None:
    write(tmp_path, "llama", TABLES["gptq-32"])
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    stored = {name: value.bfloat16() if name.endswith("scales") else value for name, value in stored.items()}
    save_file(stored, file)
    before = open_source(str(tmp_path)).tensors["model.layers.1.mlp.up_proj.weight"]
    assert before.type == "F32"
    scale = stored["model.layers.1.mlp.up_proj.scales"].float().numpy()
    steps = dequantize(before) / np.repeat(scale, 32, axis=0).T
    assert np.abs(steps - np.rint(steps)).max() < 1e-5 and np.abs(steps).max() <= 15


def test_zero_biases_of_old_exporters_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "llama", TABLES["gptq-32"], biases=True)
    source = open_source(str(tmp_path))
    bind(load_spec(source), source)


def test_groups_follow_each_other_where_no_order_is_stored(tmp_path: Path) -> None:
    model = write(tmp_path, "llama", TABLES["gptq-32"], drop=("g_idx",))
    tensor = open_source(str(tmp_path)).tensors["model.layers.0.self_attn.o_proj.weight"]
    assert np.array_equal(dequantize(tensor), dict(model.state_dict())[tensor.name].numpy())


@pytest.mark.parametrize(
    ("name", "change", "drop", "words"),
    [
        ("awq-32", {"bits": 3}, (), "3 bits"),
        ("awq-32", {"version": "gemv"}, (), "gemv"),
        ("awq-32", {"group_size": 64}, (), "group size"),
        ("awq-32", {"group_size": "x"}, (), "no group size"),
        ("awq-32", {}, ("qzeros",), "lacks the tensor .*qzeros"),
        ("gptq-32", {"bits": 2}, (), "2 bits"),
        ("gptq-32", {"bits": 8}, (), "group size"),
        ("gptq-32", {"checkpoint_format": "marlin"}, (), "marlin"),
        ("gptq-order", {}, ("g_idx",), "desc_act"),
        ("gptq-order", {"group_size": 64}, (), "group size"),
        ("gptq-32", {"quant_method": "hqq"}, (), "hqq, which cannot be read yet"),
        ("gptq-32", {"quant_method": None}, (), "an unknown method"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, change: dict[str, Any], drop: tuple[str, ...], words: str, written: Written, tmp_path: Path
) -> None:
    shutil.copytree(written(name, drop), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        open_source(str(tmp_path))


def test_the_flag_must_name_what_the_checkpoint_is(tmp_path: Path) -> None:
    write(tmp_path, "llama", TABLES["awq-32"])
    source = open_source(str(tmp_path))
    for asked in (None, "awq", "awq_marlin"):
        check_quantization(source, asked)
    for asked, words in (("gptq", "are awq"), ("gguf", "are awq"), ("int8", "U4G already")):
        with pytest.raises(ConfigError, match=words):
            check_quantization(source, asked)
