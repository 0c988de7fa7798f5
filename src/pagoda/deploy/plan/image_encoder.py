"""What the image encoder of a vision model takes, from its config.json: Qwen2-VL's and Qwen2.5-VL's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_WEIGHT_BYTES = 2


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """`token_values`: numbers that its widest layer keeps for the patches that become one token."""

    parameters: int
    token_values: int

    def total_bytes(self, tokens: int, itemsize: int) -> int:
        """Weights in 16 bits, and the work for images of that many tokens at once."""
        return self.parameters * _WEIGHT_BYTES + tokens * self.token_values * itemsize


def image_encoder(config: Mapping[str, Any]) -> ImageEncoder | None:
    """None where the config does not say enough, or the encoder is of a kind that is not known."""
    vision, kind = config.get("vision_config"), config.get("model_type")
    if not isinstance(vision, dict) or kind not in ("qwen2_vl", "qwen2_5_vl"):
        return None
    older = kind == "qwen2_vl"
    wide = _whole(vision, "embed_dim" if older else "hidden_size")
    out = _whole(vision, "hidden_size" if older else "out_hidden_size")
    depth, patch = _whole(vision, "depth"), _whole(vision, "patch_size", 14)
    inner = int(wide * _number(vision, "mlp_ratio", 4)) if older else _whole(vision, "intermediate_size")
    merged = _whole(vision, "spatial_merge_size", 2) ** 2
    if not all((wide, out, depth, patch, inner, merged)):
        return None
    norm = 2 * wide if older else wide  # the older one's has a bias
    gates = 1 if older else 2
    mlp = (gates + 1) * wide * inner + gates * inner + wide
    block = 4 * wide * wide + 4 * wide + mlp + 2 * norm
    channels = _whole(vision, "in_channels", 3) * _whole(vision, "temporal_patch_size", 2)
    merger = norm + (merged * wide + 1) * merged * wide + (merged * wide + 1) * out
    parameters = channels * patch * patch * wide + depth * block + merger
    return ImageEncoder(parameters, merged * (2 * wide + max(4 * wide, (gates + 1) * inner)))


def _whole(table: Mapping[str, Any], key: str, default: int = 0) -> int:
    value = table.get(key, default)
    return value if type(value) is int and value > 0 else 0


def _number(table: Mapping[str, Any], key: str, default: float) -> float:
    value = table.get(key, default)
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0
