"""Models that see in GGUF, beside Qwen's: with the encoder in a file of its own, as llama.cpp writes both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeing_models
import torch
from checkpoints import neighbours
from gguf_writer import write_gguf
from seeing_models import BREAK_TOKENS, IMAGE, START, STOP, VIDEO, VOCAB, load, logits, pictures, prompt, step, worst

from pagoda.arch.names.bind import checkpoint_name
from pagoda.arch.registry import bind, load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize
from pagoda.weights.open import open_source

NAMES = {
    "gemma3": {IMAGE: "<image_soft_token>", START: "<start_of_image>", STOP: "<end_of_image>"},
    "mistral3": {IMAGE: "[IMG]", BREAK_TOKENS[0]: "[IMG_BREAK]", BREAK_TOKENS[1]: "[IMG_END]"},
    "internvl": {IMAGE: "<IMG_CONTEXT>"},
    "idefics3": {IMAGE: "<image>"},
    "glm4v": {IMAGE: "<|image|>", VIDEO: "<|video|>"},
}
LANGUAGES = {"internvl": "qwen3", "idefics3": "llama", "glm4v": "glm4"}
REORDERED = ("mistral3", "idefics3")
LAYER = {"attn_scale": "ls1", "mlp_scale": "ls2"}
LAYER |= {
    "attn_norm": "ln1",
    "o": "attn_out",
    "mlp_norm": "ln2",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
ENDS = {
    "gemma3": {"merge_norm": "v.post_ln", "mean_norm": "mm.soft_emb_norm", "merge_down": "mm.input_projection"},
    "mistral3": {
        "first_norm": "v.pre_ln",
        "merge_norm": "mm.input_norm",
        "merge_in": "mm.patch_merger",
        "merge_up": "mm.1",
        "merge_down": "mm.2",
    },
    "internvl": {"merge_norm": "mm.model.mlp.0", "merge_up": "mm.model.mlp.1", "merge_down": "mm.model.mlp.3"},
    "idefics3": {"merge_norm": "v.post_ln", "merge_down": "mm.model.fc"},
    "glm4v": {
        "first_norm": "v.norm_embd",
        "merge_norm": "v.post_ln",
        "merge_in": "mm.patch_merger",
        "merge_mid": "mm.model.fc",
        "mid_norm": "mm.post_norm",
        "merge_gate": "mm.gate",
        "merge_up": "mm.up",
        "merge_down": "mm.down",
    },
}


def in_halves(values: Any, heads: int, turned: int) -> Any:
    """The rows of each head whose pairs are neighbours, as the converter of GLM's models that see orders them."""
    apart = values.reshape(heads, -1, *values.shape[1:])
    pairs = apart[:, :turned]
    return np.concatenate([pairs[:, ::2], pairs[:, 1::2], apart[:, turned:]], axis=1).reshape(values.shape)


def write_language(folder: Path, kind: str, spec: ModelSpec, slots: dict[str, Any]) -> None:
    a = spec.layers[0].attention
    tensors = {}
    for slot, values in slots.items():
        if slot.startswith("vision."):
            continue
        if kind in REORDERED and slot.endswith((".q", ".k")):
            values = neighbours(torch.from_numpy(values), a.heads if slot.endswith(".q") else a.kv_heads).numpy()
        if kind == "glm4v" and (part := slot.rpartition(".")[2].removesuffix("_bias")) in ("q", "k"):
            values = in_halves(values, a.heads if part == "q" else a.kv_heads, spec.rope.dim)
        tensors[checkpoint_name(slot, gguf=True, family=spec.model_type)] = values
    table: dict[str, Any] = {
        "context_length": spec.max_position,
        "embedding_length": spec.hidden_size,
        "block_count": len(spec.layers),
        "feed_forward_length": spec.layers[0].mlp.size,
        "attention.head_count": a.heads,
        "attention.head_count_kv": a.kv_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.freq_base": 1e6,
    }
    if kind == "glm4v":
        sections = {"rope.dimension_sections": [*spec.rope.sections, 0], "rope.dimension_count": spec.rope.dim}
        table |= {**sections, "rope.freq_base": 1e4}
    if kind == "gemma3":
        table |= {"attention.sliding_window": 40, "attention.sliding_window_pattern": 2}
    tokens = [NAMES[kind].get(i, f"token {i}") for i in range(VOCAB)]
    arch = LANGUAGES.get(kind, kind)
    table = {"general.architecture": arch, **{f"{arch}.{name}": value for name, value in table.items()}}
    table |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1}
    write_gguf(folder / "model.gguf", table, tensors)


def write_encoder(folder: Path, kind: str, spec: ModelSpec, slots: dict[str, Any]) -> None:
    v = spec.vision
    assert v is not None
    tensors: dict[str, Any] = {"v.token_embd.img_break": np.zeros(64, np.float32)} if kind == "mistral3" else {}
    for slot, values in slots.items():
        if not slot.startswith("vision."):
            continue
        prefix, _, part = slot.removeprefix("vision.").rpartition(".")
        stem, suffix = part.removesuffix("_bias"), "bias" if part.endswith("_bias") else "weight"
        number = prefix.removeprefix("layers.")
        if stem == "qkv":
            for letter, own in zip("qkv", np.split(values, 3), strict=True):
                if kind == "mistral3" and letter != "v":
                    own = neighbours(torch.from_numpy(own), v.heads).numpy()
                tensors[f"v.blk.{number}.attn_{letter}.{suffix}"] = own
        elif prefix:
            tensors[f"v.blk.{number}.{LAYER[stem]}.{suffix}"] = values
        elif stem == "patch":
            size, frames = v.patch_size, v.temporal_patch_size
            if suffix == "bias":
                tensors["v.patch_embd.bias"] = values
                continue
            for frame in range(frames):
                each = values.reshape(-1, 3, frames, size, size)[:, :, frame]
                tensors["v.patch_embd.weight" + ".1" * frame] = np.ascontiguousarray(each)
        elif stem == "positions":
            if v.class_token:  # what its row begins with, and its position
                half = values[-1] / 2
                tensors["v.class_embd"], values = half, np.concatenate([half[None], values[:-1]])
            tensors["v.position_embd.weight"] = values
        else:
            if stem == "merge_in" and suffix == "weight":  # the neighbours of one channel side by side
                values = values.reshape(len(values), v.merge_size**2, -1).transpose(0, 2, 1).reshape(values.shape)
            if stem == "merge_down" and kind == "gemma3":
                values = np.ascontiguousarray(values.T)
            tensors[f"{ENDS[kind][stem]}.{suffix}"] = values
    table: dict[str, Any] = {
        "block_count": v.depth,
        "embedding_length": v.hidden_size,
        "feed_forward_length": v.intermediate_size,
        "projection_dim": spec.hidden_size,
        "attention.head_count": v.heads,
        "attention.layer_norm_epsilon": v.norm_eps,
        "patch_size": v.patch_size,
        "image_size": v.side * v.patch_size or v.longest_edge,
        "image_mean": list(v.mean),
        "image_std": list(v.std),
        **({"spatial_merge_size": 2} if kind == "mistral3" else {"projector.scale_factor": v.merge_size}),
    }
    table = {f"clip.vision.{name}": value for name, value in table.items()}
    table |= {"general.architecture": "clip", "clip.projector_type": {"mistral3": "pixtral"}.get(kind, kind)}
    write_gguf(folder / "mmproj-F32.gguf", table | {"clip.use_gelu": True}, tensors)


@pytest.mark.parametrize("kind", NAMES)
def test_it_is_the_model_that_safetensors_hold(kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    seeing_models.write(tmp_path / "hub", kind, **({} if kind in ("gemma3", "glm4v") else rope))
    stored = open_source(str(tmp_path / "hub"))
    spec = load_spec(stored)
    slots = {slot: dequantize(tensor).copy() for slot, tensor in bind(spec, stored).items()}
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_language(folder, kind, spec, slots)
    assert load_spec(open_source(str(folder))).vision is None
    write_encoder(folder, kind, spec, slots)
    source = open_source(str(folder))
    found = load_spec(source)
    assert found.vision is not None and spec.vision is not None
    assert found.vision.takes_videos == (kind not in ("gemma3", "mistral3", "internvl", "idefics3"))
    for field in set(spec.vision.__slots__) - {"video_text"}:
        assert getattr(found.vision, field) == pytest.approx(getattr(spec.vision, field), abs=1e-6), field
    for slot, tensor in bind(found, source).items():
        if slot.startswith("vision."):
            np.testing.assert_array_equal(dequantize(tensor), slots[slot], err_msg=slot)
    tokens, images = prompt(spec.vision, pictures(kind, spec.vision))
    ours = load(folder, "cpu")
    seen = logits(ours, step(found, tokens, images))
    expected = load(tmp_path / "hub", "cpu")
    assert worst(seen, logits(expected, step(spec, tokens, images))) < 1e-3
    assert not math.isnan(seen.sum())
    for executor in (ours, expected):
        executor.close()


def test_an_encoder_of_another_model_is_refused(tmp_path: Path) -> None:
    for kind in NAMES:
        seeing_models.write(tmp_path / kind, kind)
    both = {kind: open_source(str(tmp_path / kind)) for kind in NAMES}
    parts = {
        kind: (spec := load_spec(source), {slot: dequantize(t).copy() for slot, t in bind(spec, source).items()})
        for kind, source in both.items()
    }
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_language(folder, "gemma3", *parts["gemma3"])
    write_encoder(folder, "mistral3", *parts["mistral3"])
    with pytest.raises(ModelError, match="with a pixtral, is of another model"):
        load_spec(open_source(str(folder)))
