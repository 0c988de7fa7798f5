"""What the vision encoder of a model is made of, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision encoder of Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL: pixels to vectors.

    A patch is `patch_size`² pixels of `temporal_patch_size` frames in RGB, normalized by `mean` and `std` (of values
    0 to 1). Patches go through `depth` layers x += attention(norm(x)); x += mlp(norm(x)), whose heads turn by row and
    column; `merge_size`² neighbours are joined, and an MLP with gelu makes them one vector of the model's hidden size.
    A patch attends to the patches of its own frames: to all of them, or in layers that are not in `full_layers` to
    those in its window of `window_size`² pixels (0: no windows). `gated`: the MLP of a layer is
    down(act(gate(x)) * up(x)), else down(act(up(x))). `tokens_per_second` None: groups of frames are one position
    apart, whatever time lies between them. `frame_tokens`: each group of frames stands alone, between these two tokens,
    behind its time as text. `grid_side`: a patch has a learned position, of a square table with so many on a side that
    is spread over the picture (0: none). What comes out of `deep_layers` is joined too, by MLPs with a norm over all
    that is joined, and added to the tokens behind the first layers of the language model (arXiv 2406.04334).
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    hidden_size: int
    heads: int
    depth: int
    intermediate_size: int
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]
    gated: bool
    norm: Literal["layer", "rms"]
    norm_eps: float
    image_token_id: int
    video_token_id: int
    window_size: int = 0
    full_layers: tuple[int, ...] = ()
    tokens_per_second: float | None = None
    patch_bias: bool = False
    grid_side: int = 0
    deep_layers: tuple[int, ...] = ()
    frame_tokens: tuple[int, int] | None = None
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def patch_values(self) -> int:
        """Numbers of a patch, in the order of channel, frame, row, column."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of the patches that become one token, side by side."""
        return self.hidden_size * self.merge_size**2

    @property
    def vectors(self) -> int:
        """How many a token has, side by side: the one that it begins with, and those that are added later."""
        return 1 + len(self.deep_layers)

    def sees_all(self, layer: int) -> bool:
        return not self.window_size or layer in self.full_layers

    def slots(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of the encoder with its shape; `hidden` is the width of the language model."""
        wide, inner, merged = self.hidden_size, self.intermediate_size, self.merged_size
        products = {"qkv": (3 * wide, wide), "o": (wide, wide), "up": (inner, wide), "down": (wide, inner)}
        if self.gated:
            products["gate"] = (inner, wide)
        norms: dict[str, tuple[int, ...]] = {"attn_norm": (wide,), "mlp_norm": (wide,)}
        layer = _with_biases(products) | (_with_biases(norms) if self.norm == "layer" else norms)
        out: dict[str, tuple[int, ...]] = {"patch": (wide, self.patch_values)}
        out |= {"patch_bias": (wide,)} if self.patch_bias else {}
        out |= {"positions": (self.grid_side**2, wide)} if self.grid_side else {}
        for i in range(self.depth):
            out |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        out |= {"merge_norm": (wide,)} | ({"merge_norm_bias": (wide,)} if self.norm == "layer" else {})
        merge = _with_biases({"merge_up": (merged, merged), "merge_down": (hidden, merged)})
        deep = merge | {"merge_norm": (merged,), "merge_norm_bias": (merged,)}
        for i in range(len(self.deep_layers)):
            out |= {f"deep.{i}.{name}": shape for name, shape in deep.items()}
        return out | merge


def _with_biases(slots: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Each slot and its bias, which is as long as the slot's outputs."""
    return dict(slots) | {f"{name}_bias": shape[:1] for name, shape in slots.items()}
