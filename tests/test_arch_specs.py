"""Specs from both formats: old and new spellings, defaults, and one clear sentence for each thing that is wrong."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_tiny

from pagoda.arch import registry, rope
from pagoda.arch.fields import Fields
from pagoda.arch.names.bind import checkpoint_name, slot_name
from pagoda.arch.registry import bind, load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
GGUF: Mapping[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 5,
    "tokenizer.ggml.eom_token_id": 2,
}


@dataclass
class Source:
    """A checkpoint in memory."""

    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    path: str = "memory"

    def close(self) -> None:
        pass


def tensor(name: str, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
    return Tensor(name, shape, "F32", np.full(shape, fill, np.float32).reshape(-1).view(np.uint8))


def full(spec: ModelSpec, *, gguf: bool = False) -> dict[str, Tensor]:
    names = {checkpoint_name(slot, gguf=gguf): shape for slot, shape in spec.slots().items()}
    return {name: tensor(name, shape) for name, shape in names.items()}


def from_config(**changes: Any) -> ModelSpec:
    return load_spec(Source(config={**CONFIG, **changes}))


def from_gguf(*extra: str, **changes: Any) -> ModelSpec:
    """Changes are spelled with `__` for the dots; `extra` names tensors that are there."""
    table = {**GGUF, **{f"llama.{name.replace('__', '.')}": value for name, value in changes.items()}}
    tensors = {name: tensor(name, (96, 64)) for name in ("token_embd.weight", *extra)}
    return load_spec(Source(metadata=table, tensors=tensors))


def test_both_formats_give_the_same_spec() -> None:
    a, b = from_config(tie_word_embeddings=True), from_gguf()
    assert a.rope.inv_freq == b.rope.inv_freq and (a.rope.interleaved, b.rope.interleaved) == (False, True)
    assert (a.layers, a.eos_token_ids, a.bos_token_id) == (b.layers, b.eos_token_ids, b.bos_token_id)
    assert (a.vocab_size, a.hidden_size, a.max_position, a.tied) == (96, 64, 128, True)
    assert (b.vocab_size, b.hidden_size, b.max_position, b.tied) == (96, 64, 128, True)


def test_every_file_of_an_architecture_has_both_builders() -> None:
    assert {"bert", "gpt2", "llama", "mixtral", "qwen2_5_vl", "qwen3"} <= set(registry.supported())
    for name in registry.supported():
        module = importlib.import_module(f"pagoda.arch.models.{name}")
        assert callable(module.from_config) and callable(module.from_gguf)


@pytest.mark.parametrize(
    "name", ["gptj", "memory", "registry", "qwen2-vi", "llama.evil", "../llama", "os", 7, ["llama"]]
)
def test_other_architectures_are_refused_with_the_list(name: Any) -> None:
    for source in (Source(config={**CONFIG, "model_type": name}), Source(metadata={"general.architecture": name})):
        with pytest.raises(ModelError, match=r"not supported \(supported: .*gpt2, .*llama, .*qwen3, ") as caught:
            load_spec(source)
        assert str(name) in str(caught.value)


def test_a_missing_architecture_is_named() -> None:
    with pytest.raises(ModelError, match=r"model_type in config.json is missing"):
        load_spec(Source(config={"hidden_size": 3}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"num_key_value_heads": 3}, "cannot share 3 KV heads"),
        ({"rms_norm_eps": 10**400}, "must be a number above 0"),
        ({"hidden_act": ["silu"]}, "is .'silu'.; this architecture"),
        ({"head_dim": 1 << 30}, "at most 65536 is possible"),
        ({"hidden_act": "gelu"}, "'gelu'; this architecture is supported with silu only"),
        ({"head_dim": 15}, "rotary dimension 15"),
        ({"rope_scaling": {"type": "ntk"}}, "rope type 'ntk' is not supported.*yarn"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer to layer"),
        ({"rope_scaling": "yarn"}, "are 'yarn', must be a table"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "must be below high_freq_factor",
        ),
    ],
)
def test_a_wrong_config_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        from_config(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context_length": None}, "llama.context_length is missing"),
        ({"attention__head_count_kv": [2, 1]}, "differs from layer to layer"),
        ({"attention__head_count_kv": [[2], "1"]}, "must be a whole number or one for each layer"),
        ({"attention__head_count": 128}, "heads are more than"),
        ({"attention__value_length": 32}, "differs from attention.key_length"),
        ({"rope__scaling__type": "longrope"}, "'longrope'; supported: none, linear, yarn"),
        ({"rope__dimension_count": 32}, "rotary dimension 32"),
    ],
)
def test_wrong_gguf_metadata_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        from_gguf(**changes)


@pytest.mark.parametrize("given", [1.5, [["full_attention"], {}], ["linear"] * 2])
@pytest.mark.parametrize(("kind", "field"), [("cohere2", "layer_types"), ("smollm3", "no_rope_layers")])
def test_kinds_of_layers_that_are_none(kind: str, field: str, given: Any) -> None:
    with pytest.raises(ModelError, match=f"{field} .*must hold .* for each layer"):
        from_config(model_type=kind, num_hidden_layers=2, **{field: given})


def test_gguf_without_an_embedding() -> None:
    with pytest.raises(ModelError, match=r"token_embd\.weight"):
        load_spec(Source(metadata=GGUF))


def test_gguf_tensors_tell_heads_and_biases() -> None:
    spec = from_gguf("output.weight", "blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias")
    assert not spec.tied and spec.layers[0].mlp.bias
    assert spec.layers[0].attention.qkv_bias and spec.layers[0].attention.out_bias


def test_gguf_arrays_per_layer_that_agree() -> None:
    spec = from_gguf(attention__head_count_kv=[2, 2], feed_forward_length=np.array([128, 128]))
    assert spec == from_gguf()


def test_defaults_of_a_short_config() -> None:
    spec = from_config(num_key_value_heads=None, head_dim=None, rms_norm_eps=None, eos_token_id=None, bos_token_id=None)
    attention = spec.layers[0].attention
    assert (attention.kv_heads, attention.head_dim, spec.norm_eps) == (4, 16, 1e-6)
    assert (spec.tied, spec.eos_token_ids, spec.bos_token_id) == (False, (), None)
    assert from_config(model_type="qwen3").layers[0].attention.head_dim == 128


def test_windows() -> None:
    def windows(**changes: Any) -> list[int | None]:
        return [layer.attention.window for layer in from_config(num_hidden_layers=3, **changes).layers]

    assert windows(model_type="mistral", sliding_window=64) == [64, 64, 64]
    assert windows(model_type="mistral", sliding_window=None) == [None] * 3
    assert windows(model_type="mistral", sliding_window=128) == [None] * 3  # no context outgrows it
    assert windows(model_type="mistral", max_position_embeddings=8192) == [4096] * 3
    qwen = {"model_type": "qwen2", "sliding_window": 64, "max_window_layers": 1}
    assert windows(**qwen) == [None] * 3
    assert windows(**qwen, use_sliding_window=True) == [None, 64, 64]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(**qwen, use_sliding_window=True, layer_types=kinds) == [64, None, 64]
    with pytest.raises(ModelError, match="layer_types"):
        windows(**qwen, use_sliding_window=True, layer_types=kinds[:2])


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
)
def test_old_and_new_spelling_of_rope(recipe: dict[str, Any]) -> None:
    new = from_config(rope_parameters={"rope_theta": 5000.0, **recipe})
    assert new == from_config(rope_theta=5000.0, rope_scaling=recipe or None)
    oldest = {"type" if key == "rope_type" else key: value for key, value in recipe.items()}
    assert new == from_config(rope_theta=5000.0, rope_scaling=oldest or None)
    assert new.rope != from_config().rope


def test_yarn_lengthens_the_context() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert from_config(rope_scaling=yarn).max_position == 512
    assert from_config(rope_scaling=yarn, max_position_embeddings=4096).max_position == 4096
    assert from_config(rope_scaling={"type": "linear", "factor": 4.0}).max_position == 128


def test_dynamic_is_the_default_up_to_the_longest_context() -> None:
    assert from_config(rope_scaling={"type": "dynamic", "factor": 2.0}) == from_config()


def test_partial_rotary() -> None:
    spec = from_config(partial_rotary_factor=0.5)
    assert spec.rope.dim == 8 and spec.layers[0].attention.head_dim == 16
    np.testing.assert_allclose(spec.rope.inv_freq, 10000.0 ** -(np.arange(4) / 4))
    assert from_gguf(rope__dimension_count=8).rope.inv_freq == spec.rope.inv_freq


def test_gguf_frequency_divisors() -> None:
    divisors = np.array([1, 2, 4, 8, 8, 8, 8, 8], np.float32)
    tensors = {"token_embd.weight": tensor("token_embd.weight", (96, 64))}
    tensors["rope_freqs.weight"] = Tensor("rope_freqs.weight", (8,), "F32", divisors.view(np.uint8))
    spec = load_spec(Source(metadata=GGUF, tensors=tensors))
    np.testing.assert_allclose(np.array(spec.rope.inv_freq) * divisors, from_gguf().rope.inv_freq)
    tensors["rope_freqs.weight"] = Tensor("rope_freqs.weight", (4,), "F32", divisors[:4].view(np.uint8))
    with pytest.raises(ModelError, match=r"rope_freqs.weight is F32 \(4,\)"):
        load_spec(Source(metadata=GGUF, tensors=tensors))


def test_gguf_scaling_equals_config_scaling() -> None:
    linear = from_config(rope_scaling={"type": "linear", "factor": 2.0}).rope.inv_freq
    assert from_gguf(rope__scaling__type="linear", rope__scaling__factor=2.0).rope.inv_freq == linear
    assert from_gguf(rope__scale_linear=2.0).rope.inv_freq == linear
    assert from_gguf(rope__scaling__type="none", rope__scaling__factor=2.0).rope == from_gguf().rope
    assert from_gguf(rope__scaling__factor=0.0).rope == from_gguf().rope
    theirs = from_config(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32}
    ours = from_gguf(**yarn)
    assert (ours.rope.inv_freq, ours.rope.attention_factor) == (theirs.rope.inv_freq, theirs.rope.attention_factor)
    doubled = from_gguf(**yarn, rope__scaling__attn_factor=2.0)
    assert doubled.rope.attention_factor == 2 * ours.rope.attention_factor


def test_llama3_by_hand() -> None:
    """Waves longer than the context are slowed 8 times, those shorter than a quarter of it kept."""
    freq = 2 * np.pi / np.array([1000.0, 100.0, 25.0, 10.0])
    scaled = rope.llama3_frequencies(freq, factor=8.0, low=1.0, high=4.0, original_length=100)
    np.testing.assert_allclose(scaled / freq, [1 / 8, 1 / 8, 1, 1])


@pytest.mark.parametrize("gguf", [False, True])
def test_a_whole_checkpoint_is_bound(gguf: bool) -> None:
    spec = from_gguf("output.weight") if gguf else from_config()
    source = Source(metadata=GGUF if gguf else {}, config={} if gguf else CONFIG, tensors=full(spec, gguf=gguf))
    bound = bind(spec, source)
    assert list(bound) == list(spec.slots())
    q = "blk.1.attn_q.weight" if gguf else "model.layers.1.self_attn.q_proj.weight"
    assert bound["layers.1.q"].name == q


def test_missing_tensors_are_named() -> None:
    spec = from_config()
    source = Source(CONFIG, tensors=full(spec))
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"lacks 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight.*incomplete"):
        bind(spec, source)


def test_a_missing_head_says_how_to_tie_it() -> None:
    spec = from_config()
    source = Source(CONFIG, tensors=full(spec))
    del source.tensors["lm_head.weight"]
    with pytest.raises(ModelError, match=r'lm_head\.weight.*"tie_word_embeddings": true'):
        bind(spec, source)


def test_wrong_shapes_are_named() -> None:
    spec = from_config()
    source = Source(CONFIG, tensors=full(spec))
    source.tensors["model.norm.weight"] = tensor("model.norm.weight", (63,))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(63,\).*\(64,\)"):
        bind(spec, source)


def test_left_over_tensors_are_named_but_for_harmless_ones() -> None:
    spec = from_config()
    source = Source(CONFIG, tensors=full(spec))
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rope_freqs.weight"):
        source.tensors[name] = tensor(name, (8,))
    bind(spec, source)
    source.tensors["model.layers.0.self_attn.q_proj.bias"] = tensor("b", (64,))
    with pytest.raises(ModelError, match=r"that a llama model lacks: model\.layers\.0\.self_attn\.q_proj\.bias"):
        bind(spec, source)


def test_a_tied_head_that_is_there_too() -> None:
    """The same numbers: still tied. Other numbers: the head counts. Only the head: it is the embedding too."""
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = full(from_config(tie_word_embeddings=False))
    assert load_spec(Source(config, tensors=tensors)).tied
    assert "head" not in bind(load_spec(Source(config, tensors=tensors)), Source(config, tensors=tensors))
    other = {**tensors, "lm_head.weight": tensor("lm_head.weight", (96, 64), 1.0)}
    spec = load_spec(Source(config, tensors=other))
    assert not spec.tied and bind(spec, Source(config, tensors=other))["head"].name == "lm_head.weight"
    del other["model.embed_tokens.weight"]
    spec = load_spec(Source(config, tensors=other))
    assert spec.tied and bind(spec, Source(config, tensors=other))["embed"].name == "lm_head.weight"


def test_fields_take_numpy_numbers() -> None:
    table = Fields({"a": np.uint32(3), "b": np.float32(0.5), "c": np.bool_(True)}, "table")
    assert (table.integer("a"), table.number("b"), table.flag("c", False)) == (3, 0.5, True)


@pytest.mark.parametrize("kind", vl_tiny.KINDS)
def test_models_that_see(kind: str) -> None:
    spec = load_spec(Source(config=vl_tiny.config(kind)))
    assert spec.vision is not None and spec.rope.sections == (2, 3, 3)
    assert spec.rope.axes().tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert (spec.vision.image_token_id, spec.vision.video_token_id) == (vl_tiny.IMAGE, vl_tiny.VIDEO)
    assert all(layer.attention.qkv_bias and not layer.attention.qk_norm for layer in spec.layers)
    tensors = {slot_name(spec, slot): tensor(slot, shape) for slot, shape in spec.slots().items()}
    assert bind(spec, Source(tensors=tensors)).keys() == spec.slots().keys()
    other = {f"model.{n}" if n.startswith("visual.") else n.replace("model.", "model.language_model."): t
             for n, t in tensors.items()}  # fmt: skip
    assert bind(spec, Source(tensors=other)).keys() == spec.slots().keys()
    third = {n if n.startswith("visual.") else f"language_model.{n}": t for n, t in tensors.items()}
    assert bind(spec, Source(tensors=third)).keys() == spec.slots().keys()


def test_a_longer_context_keeps_the_three_positions() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mrope_section": [2, 3, 3]}
    spec = load_spec(Source(config=vl_tiny.config(rope_scaling=yarn)))
    assert spec.max_position == 2048 and spec.rope.sections == (2, 3, 3) and spec.rope.attention_factor > 1.1


@pytest.mark.parametrize(
    ("changes", "vision", "says"),
    [
        ({"vision_config": None}, {}, "vision_config is missing"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, {}, r"\[2, 3, 4\], must be three numbers"),
        ({}, {"out_hidden_size": 96}, "the encoder gives vectors of 96, the language model takes 64"),
        ({}, {"in_chans": 1}, "in_chans is 1; pictures have 3 channels"),
        ({}, {"hidden_act": "relu"}, "supported with silu only"),
        ({}, {"num_heads": 5}, "5 heads of a row and a column do not fit 64"),
        ({}, {"window_size": 50}, "window_size 50 does not hold whole tokens"),
        ({}, {"fullatt_block_indexes": "all"}, "fullatt_block_indexes is 'all'"),
    ],
)
def test_what_an_encoder_cannot_be(changes: dict[str, Any], vision: dict[str, Any], says: str) -> None:
    table = vl_tiny.config()
    table = {**table, "vision_config": {**table["vision_config"], **vision}, **changes}
    with pytest.raises(ModelError, match=says):
        load_spec(Source(config=table))


@pytest.mark.parametrize("page", ["models.md", "models.zh-CN.md"])
def test_the_page_of_models_names_every_architecture(page: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / page).read_text("utf-8")
    assert [name for name in registry.supported() if f"`{name}`" not in text] == []


def test_the_page_on_adding_a_model_shows_a_file_that_is_served() -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "adding-a-model.md").read_text("utf-8")
    file = (root / "src" / "pagoda" / "arch" / "models" / "seed_oss.py").read_text("utf-8")
    assert "\n".join(f"   {line}".rstrip() for line in file.splitlines()) in page
