"""What checkpoints of vision models call the slots of the encoder, and the spellings of all the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from pagoda.weights.source import Tensor

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
_PLAIN_MLP = MappingProxyType({"up": "mlp.fc1", "down": "mlp.fc2"})
_GATED_MLP = MappingProxyType({"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"})

# on the hub the language model is `model.*`; transformers since 4.52 has both inside `model.*`
_WRAPPED = re.compile(r"^model\.(?=visual\.)|(?<=^model\.)language_model\.|^language_model\.")


def encoder_slot_name(slot: str, *, gated: bool) -> str:
    """The name of the tensor that fills a slot `vision.*`, such as `visual.blocks.0.attn.qkv.weight`."""
    prefix, _, part = slot.removeprefix("vision.").rpartition(".")
    stem = part.removesuffix("_bias")
    suffix = "bias" if part.endswith("_bias") else "weight"
    name = _NAMES.get(stem) or (_GATED_MLP if gated else _PLAIN_MLP)[stem]
    layer = f"blocks.{prefix.removeprefix('layers.')}." if prefix else ""
    return f"visual.{layer}{name}.{suffix}"


def hub_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vision model's tensors under the hub's spelling."""
    return {_WRAPPED.sub("", name, count=1): tensor for name, tensor in tensors.items()}
