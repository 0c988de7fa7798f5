"""What checkpoints call the slots of encoders that are not Qwen's, and how they store what differs from these."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from pagoda.arch.vision_spec import Vision
from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import Bytes, MadeTensor
from pagoda.weights.source import Tensor

Floats = npt.NDArray[np.float32]
Turn = Callable[[Floats], Floats]

_CLIP_LAYER = MappingProxyType(
    {
        "attn_norm": "layer_norm1",
        "qkv": "self_attn.*_proj",
        "o": "self_attn.out_proj",
        "mlp_norm": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
)
_NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "siglip": {
            "patch": "vision_tower.embeddings.patch_embedding",
            "positions": "vision_tower.embeddings.position_embedding",
            "merge_norm": "vision_tower.post_layernorm",
            "mean_norm": "multi_modal_projector.mm_soft_emb_norm",
            "merge_down": "multi_modal_projector.mm_input_projection_weight",
            "layers": "vision_tower.encoder.layers",
            **_CLIP_LAYER,
        },
        "idefics": {
            "patch": "vision_model.embeddings.patch_embedding",
            "positions": "vision_model.embeddings.position_embedding",
            "merge_norm": "vision_model.post_layernorm",
            "merge_down": "connector.modality_projection.proj",
            "layers": "vision_model.encoder.layers",
            **_CLIP_LAYER,
        },
        "clip": {
            "patch": "vision_tower.embeddings.patch_embedding",
            "positions": "vision_tower.embeddings.position_embedding",
            "class": "vision_tower.embeddings.class_embedding",
            "first_norm": "vision_tower.pre_layrnorm",
            "merge_up": "multi_modal_projector.linear_1",
            "merge_down": "multi_modal_projector.linear_2",
            "layers": "vision_tower.encoder.layers",
            **_CLIP_LAYER,
        },
        "glm": {
            "patch": "visual.patch_embed.proj",
            "positions": "visual.embeddings.position_embedding",
            "first_norm": "visual.post_conv_layernorm",
            "merge_norm": "visual.post_layernorm",
            "merge_in": "visual.downsample",
            "merge_mid": "visual.merger.proj",
            "mid_norm": "visual.merger.post_projection_norm",
            "merge_gate": "visual.merger.gate_proj",
            "merge_up": "visual.merger.up_proj",
            "merge_down": "visual.merger.down_proj",
            "layers": "visual.blocks",
            "attn_norm": "norm1",
            "qkv": "attn.qkv",
            "o": "attn.proj",
            "mlp_norm": "norm2",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        },
        "internvl": {
            "patch": "vision_tower.embeddings.patch_embeddings.projection",
            "positions": "vision_tower.embeddings.position_embeddings",
            "class": "vision_tower.embeddings.cls_token",
            "merge_norm": "multi_modal_projector.layer_norm",
            "merge_up": "multi_modal_projector.linear_1",
            "merge_down": "multi_modal_projector.linear_2",
            "layers": "vision_tower.encoder.layer",
            "attn_norm": "layernorm_before",
            "qkv": "attention.*_proj",
            "o": "attention.projection_layer",
            "attn_scale": "lambda_1",
            "mlp_norm": "layernorm_after",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
            "mlp_scale": "lambda_2",
        },
        "pixtral": {
            "patch": "vision_tower.patch_conv",
            "first_norm": "vision_tower.ln_pre",
            "merge_norm": "multi_modal_projector.norm",
            "merge_in": "multi_modal_projector.patch_merger.merging_layer",
            "merge_up": "multi_modal_projector.linear_1",
            "merge_down": "multi_modal_projector.linear_2",
            "layers": "vision_tower.transformer.layers",
            "attn_norm": "attention_norm",
            "qkv": "attention.*_proj",
            "o": "attention.o_proj",
            "mlp_norm": "ffn_norm",
            "gate": "feed_forward.gate_proj",
            "up": "feed_forward.up_proj",
            "down": "feed_forward.down_proj",
        },
    }
)
# newer versions of transformers have the first part; and no other, which older files do
_WRAPPED = re.compile(
    r"^(model\.)?(?=multi_modal_projector\.|vision_tower\.|vision_model\.|connector\.)|(?<=^vision_tower\.)vision_model\."
)
_BARE = ("vision_tower.embeddings.position_embeddings", "multi_modal_projector.mm_input_projection_weight")
"""Tensors whose names do not end with what they are."""
_UNUSED: Mapping[str, str] = MappingProxyType(
    {
        "siglip": r"vision_tower\.head\..*",  # what makes one vector of a picture
        "idefics": r"vision_model\.embeddings\.position_ids",
        "internvl": r"vision_tower\.embeddings\.mask_token",
        "clip": r"vision_tower\.(post_layernorm\..*|embeddings\.position_ids|encoder\.layers\..*)",
    }
)
"""Of CLIP the layers behind the last that is run are left."""


def from_hub(tensors: Mapping[str, Tensor], vision: Vision) -> dict[str, Tensor]:
    """The tensors with those of the encoder under the names of their slots."""
    plain = {_plain(name): tensor for name, tensor in tensors.items()}
    out = dict(plain)
    if vision.class_token:
        _take_class(out, vision)
    for slot in vision.slots(1):
        ours, stored = f"vision.{_with_suffix(slot)}", _stored(slot, vision)
        parts = [stored.replace("*", part) for part in "qkv"]
        if "*" in stored and all(part in out for part in parts):
            out[ours] = stacked_rows([out.pop(part) for part in parts])
        elif stored in out:
            tensor = out.pop(stored)
            if slot == "mean_norm":  # stored less 1, as all norms of a Gemma
                tensor = MadeTensor(tensor.name, tensor.shape, "F32", partial(_plus_one, tensor))
            out[ours] = as_product(slot, tensor, vision)
    unused = re.compile(_UNUSED.get(vision.names, r"(?!)"))
    return {name: tensor for name, tensor in out.items() if not unused.fullmatch(name)}


def _take_class(out: dict[str, Tensor], vision: Vision) -> None:
    """Put what the row begins with that is no patch behind the positions."""
    positions, first = _stored("positions", vision), _NAMES[vision.names]["class"]
    if positions in out and first in out:
        out[positions] = with_class(out[positions], out.pop(first))


def with_class(positions: Tensor, first: Tensor) -> Tensor:
    """Positions of patches, and behind them what the class's row begins with. Its position is stored first."""
    wide = first.shape[-1]
    shape = (math.prod(positions.shape) // wide, wide)

    def make() -> Bytes:
        table = dequantize(positions).reshape(shape)
        return _bytes(np.concatenate([table[1:], table[:1] + dequantize(first).reshape(1, wide)]))

    return MadeTensor(positions.name, shape, "F32", make)


def as_product(slot: str, tensor: Tensor, vision: Vision) -> Tensor:
    """A tensor as its slot has it, of those that both formats store in another order."""
    if vision.merge == "averaged" and slot == "merge_down":  # [in, out]
        return _floats_as(tensor, tensor.shape[::-1], lambda x: x.T)
    if slot == "merge_in":  # the values of one channel of all neighbours side by side
        shape = (tensor.shape[0], math.prod(tensor.shape[1:]))
        return _floats_as(tensor, shape, partial(_by_neighbour, vision))
    return tensor


def _by_neighbour(vision: Vision, values: Floats) -> Floats:
    apart = values.reshape(len(values), -1, vision.merge_size**2)
    return apart.transpose(0, 2, 1).reshape(len(values), -1)


def halves(count: int, head_dim: int) -> npt.NDArray[np.intp]:
    """The places of rows whose pairs are neighbours, as heads in halves have them."""
    places = np.arange(count, dtype=np.intp).reshape(-1, head_dim // 2, 2)
    return places.transpose(0, 2, 1).reshape(-1)


def stacked_rows(parts: list[Tensor]) -> Tensor:
    first = parts[0]
    if len({(part.type, part.shape) for part in parts}) > 1:
        raise ModelError(f"the tensor {first.name} is not stored like its neighbours")
    shape = (3 * first.shape[0], *first.shape[1:])
    return MadeTensor(first.name, shape, first.type, lambda: np.concatenate([part.data for part in parts]))


def _plain(name: str) -> str:
    return _WRAPPED.sub("", _WRAPPED.sub("", name, count=1), count=1)


def _with_suffix(slot: str) -> str:
    return f"{slot.removesuffix('_bias')}.{'bias' if slot.endswith('_bias') else 'weight'}"


def _stored(slot: str, vision: Vision) -> str:
    names = _NAMES[vision.names]
    prefix, _, part = slot.rpartition(".")
    stem, suffix = part.removesuffix("_bias"), "bias" if part.endswith("_bias") else "weight"
    if prefix:
        stored = f"{names['layers']}.{prefix.removeprefix('layers.')}.{names[stem]}"
        return stored if stem.endswith("_scale") else f"{stored}.{suffix}"
    return names[stem] if names[stem] in _BARE else f"{names[stem]}.{suffix}"


def _floats_as(tensor: Tensor, shape: tuple[int, ...], turn: Turn) -> Tensor:
    """The tensor in float32, turned into another order."""
    return MadeTensor(tensor.name, shape, "F32", lambda: _bytes(turn(dequantize(tensor))))


def _plus_one(tensor: Tensor) -> Bytes:
    return _bytes(dequantize(tensor) + np.float32(1))


def _bytes(values: Floats) -> Bytes:
    return np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint8)
