"""A GGUF model and its encoder in a file beside it (mmproj): the same model as in safetensors, and found by `pull`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_tiny
from gguf_writer import write_gguf

from pagoda.arch.names.bind import checkpoint_name
from pagoda.arch.registry import bind, load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.cli.main import main
from pagoda.deploy.check.check import check_model
from pagoda.deploy.pack.files import model_members
from pagoda.deploy.pack.options import plan as plan_pack
from pagoda.deploy.plan.machines import Machine
from pagoda.deploy.plan.model import planned_model
from pagoda.deploy.plan.plan import make_plan
from pagoda.errors import ConfigError, ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.options.resolve import resolve
from pagoda.weights.mmproj import preferred
from pagoda.weights.open import open_source
from pagoda.weights.source import Tensor

ARCHITECTURES = {"qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen2vl", "qwen3_vl": "qwen3vl", "qwen3_vl_moe": "qwen3vlmoe"}
PROJECTORS = {"qwen2_vl": "qwen2vl_merger", "qwen2_5_vl": "qwen2.5vl_merger"}
LAYER = {"attn_norm": "ln1", "qkv": "attn_qkv", "o": "attn_out", "mlp_norm": "ln2"}
LAYER |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
ENDS = {"positions": "v.position_embd", "merge_norm": "v.post_ln", "merge_up": "mm.0", "merge_down": "mm.2"}
DEEP = {"merge_norm": "norm", "merge_up": "fc1", "merge_down": "fc2"}


def write_model(folder: Path, kind: str, bound: dict[str, Tensor]) -> None:
    language = {checkpoint_name(s, gguf=True): t for s, t in bound.items() if not s.startswith("vision.")}
    text = vl_tiny.config(kind).get("text_config", vl_tiny.config(kind))
    tokens = [*vl_tiny.SPECIAL, *(f"token {i}" for i in range(vl_tiny.VOCAB - len(vl_tiny.SPECIAL)))]
    arch = ARCHITECTURES[kind]
    table: dict[str, Any] = {
        "context_length": vl_tiny.CONTEXT,
        "embedding_length": 64,
        "block_count": text["num_hidden_layers"],
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "rope.dimension_sections": [*text["rope_scaling"]["mrope_section"], 0],
    }
    if kind == "qwen3_vl_moe":
        table |= {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 96}
    table = {"general.architecture": arch, **{f"{arch}.{name}": value for name, value in table.items()}}
    table |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": vl_tiny.END}
    write_gguf(folder / "model.gguf", table | {"tokenizer.ggml.bos_token_id": 0}, language)


def write_encoder(folder: Path, kind: str, bound: dict[str, Tensor], name: str = "mmproj-F32.gguf") -> None:
    vision = vl_tiny.spec(kind).vision
    assert vision is not None
    tensors: dict[str, Any] = {}
    for slot, tensor in bound.items():
        if not slot.startswith("vision."):
            continue
        prefix, _, part = slot.removeprefix("vision.").rpartition(".")
        stem, suffix = part.removesuffix("_bias"), "bias" if part.endswith("_bias") else "weight"
        values = tensor.data.view(np.float32).reshape(tensor.shape)
        number = prefix.partition(".")[2]
        if slot == "vision.patch":
            frames = values.reshape(-1, 3, 2, vl_tiny.PATCH, vl_tiny.PATCH)
            tensors |= {"v.patch_embd.weight": frames[:, :, 0], "v.patch_embd.weight.1": frames[:, :, 1]}
        elif slot == "vision.patch_bias":
            tensors["v.patch_embd.bias"] = values
        elif prefix.startswith("deep."):
            tensors[f"v.deepstack.{vision.deep_layers[int(number)]}.{DEEP[stem]}.{suffix}"] = values
        elif not prefix:
            tensors[f"{ENDS[stem]}.{suffix}"] = values
        elif stem == "qkv" and kind in PROJECTORS:
            for letter, part_values in zip("qkv", np.split(values, 3), strict=True):
                tensors[f"v.blk.{number}.attn_{letter}.{suffix}"] = part_values
        else:
            tensors[f"v.blk.{number}.{LAYER[stem]}.{suffix}"] = values
    table: dict[str, Any] = {
        "block_count": vision.depth,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "attention.head_count": vision.heads,
        "patch_size": vision.patch_size,
        "spatial_merge_size": 2,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
    }
    if kind == "qwen2_5_vl":
        table |= {"window_size": 56, "n_wa_pattern": 2}
    if vision.deep_layers:
        table["is_deepstack_layers"] = np.array([i in vision.deep_layers for i in range(vision.depth)])
    table = {f"clip.vision.{key}": value for key, value in table.items()}
    table |= {"general.architecture": "clip", "clip.projector_type": PROJECTORS.get(kind, "qwen3vl_merger")}
    write_gguf(folder / name, table, tensors)


def both(tmp_path: Path, kind: str) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a model in safetensors, and a folder with the same in GGUF."""
    stored = open_source(vl_tiny.write(tmp_path / "hub", kind))
    bound, folder = bind(load_spec(stored), stored), tmp_path / "gguf"
    folder.mkdir()
    write_model(folder, kind, bound)
    return bound, folder


@pytest.mark.parametrize("kind", vl_tiny.ALL_KINDS)
def test_it_is_the_model_that_safetensors_hold(kind: str, tmp_path: Path) -> None:
    bound, folder = both(tmp_path, kind)
    write_encoder(folder, kind, bound)
    source, expected = open_source(str(folder / "model.gguf")), vl_tiny.spec(kind)
    spec = load_spec(source)
    assert spec.model_type == kind and spec.layers == expected.layers
    assert (spec.rope.sections, spec.rope.cyclic) == (expected.rope.sections, expected.rope.cyclic)
    assert spec.vision is not None and expected.vision is not None
    for field in expected.vision.__slots__:
        assert getattr(spec.vision, field) == pytest.approx(getattr(expected.vision, field), abs=1e-6), field
    found = bind(spec, source)
    assert found.keys() == bound.keys()
    for slot, tensor in found.items():
        np.testing.assert_array_equal(tensor.data, bound[slot].data, err_msg=slot)


def test_without_its_encoder_it_takes_text_alone(tmp_path: Path) -> None:
    _, folder = both(tmp_path, "qwen3_vl")
    source = open_source(str(folder))
    spec = load_spec(source)
    assert spec.vision is None and not spec.rope.sections
    CpuExecutor.load(spec, source, Limits(64, 1, 64, num_blocks=4, threads=1)).close()
    other = open_source(vl_tiny.write(tmp_path / "other"))
    write_encoder(folder, "qwen2_5_vl", bind(load_spec(other), other))
    with pytest.raises(ModelError, match="is of another model"):
        load_spec(open_source(str(folder)))


def test_of_several_encoders_that_in_16_bits_is_taken() -> None:
    names = ["mmproj-Q8_0.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "model-F16.gguf", "mmproj.txt"]
    assert preferred(names) == "mmproj-F16.gguf"
    assert preferred(names[:2]) == "mmproj-BF16.gguf" and preferred(["x.gguf"]) is None
    assert preferred(["a/Qwen3-VL-2B.mmproj-f16.gguf"]) == "a/Qwen3-VL-2B.mmproj-f16.gguf"


def test_plan_check_and_pack_know_an_encoder_in_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bound, folder = both(tmp_path, "qwen3_vl")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_encoder(elsewhere, "qwen3_vl", bound)
    model, encoder = str(folder / "model.gguf"), str(elsewhere / "mmproj-F32.gguf")
    config = EngineConfig(model=model, max_model_len=64)
    blind, seeing = (planned_model(Path(model), "auto", file) for file in (None, encoder))
    plans = [make_plan(each, config, Machine("a CPU", 4 << 30)) for each in (blind, seeing)]
    of_encoder = sum(tensor.nbytes for slot, tensor in bound.items() if slot.startswith("vision."))
    assert plans[0].image_bytes == 0 and plans[1].image_bytes > of_encoder
    main(["plan", model, "--mmproj", encoder, "--ram", "4GiB", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["image_bytes"] > of_encoder and f"--mmproj {encoder}" in told["command"]

    assert not [found for found in check_model(model, {}, mmproj=encoder) if "encoder" in found.text]
    refused = check_model(model, {}, mmproj=model)
    assert [found.level for found in refused][:1] == ["problem"] and "no image encoder" in refused[0].text
    broken = elsewhere / "broken.gguf"
    broken.write_bytes(Path(encoder).read_bytes()[:-4096])
    assert check_model(model, {}, mmproj=str(broken))[0].level == "problem"

    made = plan_pack(resolve([model, "--mmproj", encoder], {}), model, None)
    assert made.options["mmproj"] == "@HERE@/model/model/mmproj/mmproj-F32.gguf"
    assert [member.path for member in made.members()] == ["model/model/model.gguf", made.options["mmproj"][7:]]
    write_encoder(folder, "qwen3_vl", bound)
    found = ["m/mmproj-F32.gguf", "m/model.gguf"]
    assert [member.path for member in model_members(Path(model), "m")] == found
    assert [member.path for member in model_members(folder, "m")] == found
    with pytest.raises(ConfigError, match="no image encoder"):
        plan_pack(resolve([model, "--mmproj", "none.gguf"], {}), model, None)
