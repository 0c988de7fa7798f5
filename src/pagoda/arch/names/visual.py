"""What checkpoints of vision models call the slots of the encoder, and the spellings of all the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from pagoda.arch.names import towers
from pagoda.arch.names.towers import halves, stacked_rows
from pagoda.arch.vision_spec import Vision
from pagoda.errors import ModelError
from pagoda.weights.grouped import Bytes, MadeTensor, Stacked, part_of_stack
from pagoda.weights.parts import rows
from pagoda.weights.source import Tensor

FLOATS = ("F32", "F16", "BF16")
_NAMES = MappingProxyType(
    {
        "patch": "patch_embed.proj",
        "merge_norm": "merger.ln_q",
        "merge_up": "merger.mlp.0",
        "merge_down": "merger.mlp.2",
        "attn_norm": "norm1",
        "qkv": "attn.qkv",
        "o": "attn.proj",
        "mlp_norm": "norm2",
    }
)
_NAMES_3 = MappingProxyType(
    {
        **_NAMES,
        "positions": "pos_embed",
        "merge_norm": "norm",
        "merge_up": "linear_fc1",
        "merge_down": "linear_fc2",
        "up": "mlp.linear_fc1",
        "down": "mlp.linear_fc2",
    }
)
"""Qwen3-VL's; those of what joins patches stand below its name."""
_MMPROJ = MappingProxyType(
    {
        "patch": "v.patch_embd",
        "positions": "v.position_embd",
        "merge_norm": "v.post_ln",
        "merge_up": "mm.0",
        "merge_down": "mm.2",
    }
)
_MMPROJ_ENDS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "siglip": {"mean_norm": "mm.soft_emb_norm", "merge_down": "mm.input_projection"},
        "pixtral": {
            "first_norm": "v.pre_ln",
            "merge_norm": "mm.input_norm",
            "merge_in": "mm.patch_merger",
            "merge_up": "mm.1",
        },
        "internvl": {"merge_norm": "mm.model.mlp.0", "merge_up": "mm.model.mlp.1", "merge_down": "mm.model.mlp.3"},
        "idefics": {"merge_down": "mm.model.fc"},
        "glm": {
            "first_norm": "v.norm_embd",
            "merge_in": "mm.patch_merger",
            "merge_mid": "mm.model.fc",
            "mid_norm": "mm.post_norm",
            "merge_gate": "mm.gate",
            "merge_up": "mm.up",
            "merge_down": "mm.down",
        },
    }
)
_MMPROJ_CLASS = "v.class_embd"
_MMPROJ_UNUSED = "v.token_embd.img_break"  # a row of the language model's own table
_MMPROJ_LAYER = MappingProxyType(
    {
        "attn_norm": "ln1",
        "qkv": "attn_qkv",
        "o": "attn_out",
        "attn_scale": "ls1",
        "mlp_norm": "ln2",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
        "mlp_scale": "ls2",
    }
)
_MMPROJ_DEEP = MappingProxyType({"merge_norm": "norm", "merge_up": "fc1", "merge_down": "fc2"})
_PLAIN_MLP = MappingProxyType({"up": "mlp.fc1", "down": "mlp.fc2"})
_GATED_MLP = MappingProxyType({"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"})

# on the hub the language model is `model.*`; transformers since 4.52 has both inside `model.*`
_PICTURES = (
    *("vision_tower.", "multi_modal_projector.", "visual.", "embed_vision.", "audio_tower.", "embed_audio."),
    "vision_embedder.",  # of Gemma 4 12B
)
_WRAPPED = re.compile(r"^model\.(?=visual\.)|(?<=^model\.)(language|text)_model\.|^language_model\.")


def encoder_slot_name(slot: str, vision: Vision) -> str:
    """The name of the tensor that fills a slot `vision.*`, such as `visual.blocks.0.attn.qkv.weight`."""
    prefix, _, part = slot.removeprefix("vision.").rpartition(".")
    stem = part.removesuffix("_bias")
    suffix = "bias" if part.endswith("_bias") else "weight"
    kind, _, number = prefix.partition(".")
    place = {"layers": f"blocks.{number}.", "deep": f"deepstack_merger_list.{number}.", "": ""}[kind]
    if vision.names != "qwen":
        return f"vision.{prefix}.{stem}.{suffix}" if prefix else f"vision.{stem}.{suffix}"
    if vision.grid_side:
        merger = "merger." if not prefix and stem.startswith("merge_") else ""
        return f"visual.{place}{merger}{_NAMES_3[stem]}.{suffix}"
    name = _NAMES.get(stem) or (_GATED_MLP if vision.gated else _PLAIN_MLP)[stem]
    return f"visual.{place}{name}.{suffix}"


def from_mmproj(tensors: Mapping[str, Tensor], vision: Vision) -> dict[str, Tensor]:
    """The tensors of a GGUF model and of its encoder's own file, those of the encoder under the hub's names."""
    out = {name: tensor for name, tensor in tensors.items() if name != _MMPROJ_UNUSED}
    positions = _mmproj_name("positions", vision)
    if vision.class_token and positions in out and _MMPROJ_CLASS in out:
        out[positions] = towers.with_class(out[positions], out.pop(_MMPROJ_CLASS))
    for slot in vision.slots(1):
        stored = _mmproj_name(slot, vision)
        ours = encoder_slot_name(f"vision.{slot}", vision)
        if slot == "patch" and f"{stored}.1" in out:  # a matrix for each frame of a group
            out[ours] = _frames_joined(out.pop(stored), out.pop(f"{stored}.1"))
        elif stored in out:
            out[ours] = towers.as_product(slot, out.pop(stored), vision)
        elif all(stored.replace("qkv", part) in out for part in "qkv"):
            parts = [out.pop(stored.replace("qkv", part)) for part in "qkv"]
            if vision.names == "pixtral":  # converters make the values of a pair neighbours
                parts[:2] = (rows(part, halves(part.shape[0], vision.head_dim)) for part in parts[:2])
            out[ours] = stacked_rows(parts)
    return out


def _mmproj_name(slot: str, vision: Vision) -> str:
    ends = _MMPROJ | _MMPROJ_ENDS.get(vision.names, {})
    prefix, _, part = slot.rpartition(".")
    stem = part.removesuffix("_bias")
    suffix = "bias" if part.endswith("_bias") else "weight"
    kind, _, number = prefix.partition(".")
    if kind == "layers":
        return f"v.blk.{number}.{_MMPROJ_LAYER[stem]}.{suffix}"
    if kind == "deep":
        return f"v.deepstack.{vision.deep_layers[int(number)]}.{_MMPROJ_DEEP[stem]}.{suffix}"
    return f"{ends[stem]}.{suffix}"


def _frames_joined(first: Tensor, second: Tensor) -> Tensor:
    if first.type not in FLOATS or second.type != first.type or first.shape != second.shape:
        raise ModelError(f"the tensor {first.name} of the mmproj file is stored as {first.type}, must be floats")

    def make() -> Bytes:
        each = [t.data.view("u4" if t.type == "F32" else "u2").reshape(t.shape) for t in (first, second)]
        return np.ascontiguousarray(np.stack(each, axis=2)).reshape(-1).view(np.uint8)

    return MadeTensor(first.name, (*first.shape[:2], 2, *first.shape[2:]), first.type, make)


def apart_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Qwen3-VL's experts, which are stored with gate and up side by side and turned, as those of other models."""
    out = dict(tensors)
    for name in tensors:
        stem, found, part = name.rpartition(".mlp.experts.")
        if not found or part not in ("gate_up_proj", "down_proj"):
            continue
        stored = out.pop(name)
        width = stored.shape[-1]
        cuts = {"gate": (0, width // 2), "up": (width // 2, width)} if part == "gate_up_proj" else {"down": (0, width)}
        for kind, (first, last) in cuts.items():
            whole = f"{stem}.mlp.experts.*.{kind}_proj.weight"
            parts = tuple(_turned(part_of_stack(stored, i), first, last) for i in range(stored.shape[0]))
            out[whole] = Stacked(parts).tensor(whole)
    return out


def _turned(stored: Tensor, first: int, last: int) -> Tensor:
    """Columns first:last of a matrix, as rows."""
    if stored.type not in FLOATS:
        raise ModelError(f"the experts {stored.name} are stored as {stored.type}", remedy="Take the model in floats")

    def make() -> Bytes:
        values = stored.data.view("u4" if stored.type == "F32" else "u2").reshape(stored.shape)
        return np.ascontiguousarray(values[:, first:last].T).reshape(-1).view(np.uint8)

    return MadeTensor(stored.name, (last - first, stored.shape[0]), stored.type, make)


def hub_tensors(tensors: Mapping[str, Tensor], vision: Vision | None = None) -> dict[str, Tensor]:
    """A vision model's tensors under the hub's spelling; with an encoder of another name under ours."""
    found = {_WRAPPED.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    return found if vision is None or vision.names == "qwen" else towers.from_hub(found, vision)


def language_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the language model alone, of a model whose encoder is not run."""
    found = hub_tensors(tensors)
    return {name: t for name, t in found.items() if not name.removeprefix("model.").startswith(_PICTURES)}
