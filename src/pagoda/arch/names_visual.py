"""What checkpoints of vision models call the slots of the encoder, and the spellings of all the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from pagoda.arch.vision_spec import Vision
from pagoda.errors import ModelError
from pagoda.weights.grouped import Bytes, MadeTensor, Stacked, part_of_stack
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
_PLAIN_MLP = MappingProxyType({"up": "mlp.fc1", "down": "mlp.fc2"})
_GATED_MLP = MappingProxyType({"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"})

# on the hub the language model is `model.*`; transformers since 4.52 has both inside `model.*`
_WRAPPED = re.compile(r"^model\.(?=visual\.)|(?<=^model\.)language_model\.|^language_model\.")


def encoder_slot_name(slot: str, vision: Vision) -> str:
    """The name of the tensor that fills a slot `vision.*`, such as `visual.blocks.0.attn.qkv.weight`."""
    prefix, _, part = slot.removeprefix("vision.").rpartition(".")
    stem = part.removesuffix("_bias")
    suffix = "bias" if part.endswith("_bias") else "weight"
    kind, _, number = prefix.partition(".")
    place = {"layers": f"blocks.{number}.", "deep": f"deepstack_merger_list.{number}.", "": ""}[kind]
    if vision.grid_side:
        merger = "merger." if not prefix and stem.startswith("merge_") else ""
        return f"visual.{place}{merger}{_NAMES_3[stem]}.{suffix}"
    name = _NAMES.get(stem) or (_GATED_MLP if vision.gated else _PLAIN_MLP)[stem]
    return f"visual.{place}{name}.{suffix}"


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


def hub_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vision model's tensors under the hub's spelling."""
    return {_WRAPPED.sub("", name, count=1): tensor for name, tensor in tensors.items()}
