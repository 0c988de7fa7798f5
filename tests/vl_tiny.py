"""Writes tiny vision models to a folder: weights, tokenizer, chat template and preprocessor, as Qwen's are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pagoda.arch.models.qwen2_5_vl import from_config as qwen2_5_vl
from pagoda.arch.models.qwen2_vl import from_config as qwen2_vl
from pagoda.arch.models.qwen3_vl import from_config as qwen3_vl
from pagoda.arch.models.qwen3_vl_moe import from_config as qwen3_vl_moe
from pagoda.arch.names.bind import slot_name
from pagoda.arch.spec import ModelSpec
from pagoda.types import Image

SPECS = MappingProxyType(
    {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "qwen3_vl_moe": qwen3_vl_moe}
)
KINDS = ("qwen2_vl", "qwen2_5_vl")
ALL_KINDS = tuple(SPECS)
CONTEXT = 512
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
END, IMAGE, VIDEO = SPECIAL.index("<|im_end|>"), SPECIAL.index("<|image_pad|>"), SPECIAL.index("<|video_pad|>")
VOCAB = 288  # the special tokens, 256 bytes, and some that stand for nothing, as Qwen's vocabularies have
PATCH, MERGE = 14, 2
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LANGUAGE: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "eos_token_id": END,
        "bos_token_id": 0,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": SPECIAL.index("<|vision_start|>"),
        "vision_end_token_id": SPECIAL.index("<|vision_end|>"),
    }
)
_SHAPE = {"depth": 2, "num_heads": 4, "in_chans": 3, "patch_size": PATCH, "spatial_merge_size": MERGE}
_VISION: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen2_vl": {**_SHAPE, "embed_dim": 64, "mlp_ratio": 2, "hidden_size": 64, "hidden_act": "quick_gelu"},
        "qwen2_5_vl": {
            **_SHAPE,
            "hidden_size": 64,
            "intermediate_size": 100,  # no power of two in it, as in Qwen's
            "out_hidden_size": 64,
            "hidden_act": "silu",
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        "qwen3_vl": {
            **_SHAPE,
            "depth": 3,
            "hidden_size": 96,  # heads of 24 values, no multiple of 16, as the larger of Qwen's have
            "intermediate_size": 100,
            "out_hidden_size": 64,
            "hidden_act": "gelu_pytorch_tanh",
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 1],
        },
    }
)
_LAYERS_3: Mapping[str, Any] = MappingProxyType(
    {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }
)
_EXPERTS: Mapping[str, Any] = MappingProxyType(
    {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1}
)
_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 28 * 28,
    "max_pixels": 28 * 28 * 64,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": MERGE,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def config(kind: str = "qwen2_5_vl", **changes: Any) -> dict[str, Any]:
    """The config.json as on the hub: flat, or since Qwen3 with the language model's settings in `text_config`."""
    about = {"model_type": kind, "architectures": [_CLASSES[kind]]}
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        return {**about, **_LANGUAGE, "vision_config": {**_VISION[kind], "model_type": kind}, **changes}
    text = {**_LANGUAGE, **_LAYERS_3, **(_EXPERTS if kind == "qwen3_vl_moe" else {}), "model_type": f"{kind}_text"}
    outside = {name: _LANGUAGE[name] for name in _LANGUAGE if name.endswith("_token_id") or name.startswith("tie_")}
    vision = {**_VISION["qwen3_vl"], "model_type": f"{kind}_vision"}
    return {**about, **outside, "text_config": text, "vision_config": vision, **changes}


def spec(kind: str = "qwen2_5_vl", **changes: Any) -> ModelSpec:
    return SPECS[kind](config(kind, **changes))


def write(folder: Path, kind: str = "qwen2_5_vl", **changes: Any) -> str:
    """The folder, with a model of random weights in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, kind, **changes)
    save_file(_weights(spec(kind, **changes)), str(folder / "model.safetensors"), {"format": "pt"})
    return str(folder)


def write_files(folder: Path, kind: str = "qwen2_5_vl", **changes: Any) -> None:
    """All but the weights."""
    tokenizer().save(str(folder / "tokenizer.json"))
    files = {
        "config.json": config(kind, **changes),
        "generation_config.json": {"eos_token_id": [END, 0], "do_sample": False},
        "preprocessor_config.json": _PREPROCESSOR,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": TEMPLATE,
            "eos_token": "<|im_end|>",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return made


def picture(pixels: np.ndarray, start: int, *, video: bool = False, second_per_grid: float = 1.0) -> Image:
    """An image of pixels [frames, rows, columns, 3] that fill the grid."""
    frames, rows, columns, _ = pixels.shape
    grid = (-(-frames // 2), rows // PATCH, columns // PATCH)
    stored = np.ascontiguousarray(pixels, np.uint8).tobytes()
    return Image(
        start=start,
        tokens=grid[0] * grid[1] * grid[2] // MERGE**2,
        grid=grid,
        pixels=stored,
        digest=hashlib.blake2b(f"{video} {grid}".encode() + stored, digest_size=16).digest(),
        video=video,
        second_per_grid=second_per_grid,
    )


def _weights(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Random, by the hub's names; a patch is stored as the convolution it is."""
    rng = np.random.default_rng(11)
    out: dict[str, np.ndarray] = {}
    for slot, shape in spec.slots().items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            noise *= 1.0 if slot == "embed" else 1.5 * shape[-1] ** -0.5
        else:
            noise = 0.2 * noise + (0 if slot.endswith("bias") else 1)
        out[slot_name(spec, slot)] = noise.reshape(-1, 3, 2, PATCH, PATCH) if slot == "vision.patch" else noise
    for i in range(len(spec.layers) if spec.model_type == "qwen3_vl_moe" else 0):  # stored turned, gate beside up
        stem = f"model.layers.{i}.mlp.experts."
        gate, up, down = (out.pop(f"{stem}*.{part}_proj.weight") for part in ("gate", "up", "down"))
        out[stem + "gate_up_proj"] = np.ascontiguousarray(np.concatenate([gate, up], axis=1).transpose(0, 2, 1))
        out[stem + "down_proj"] = np.ascontiguousarray(down.transpose(0, 2, 1))
    if spec.model_type in KINDS:
        return out
    return {f"model.{n}" if n[0] == "v" else n.replace("model.", "model.language_model."): w for n, w in out.items()}
