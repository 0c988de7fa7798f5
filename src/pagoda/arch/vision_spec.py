"""What the vision encoder of a model is made of, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

ROPE_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class Vision:
    """A vision encoder: pixels to vectors. What it is made of began with Qwen2-VL's (arXiv 2409.12191).

    A patch is `patch_size`² pixels of `temporal_patch_size` frames in RGB, normalized by `mean` and `std` (of values
    0 to 1). Patches go through `depth` layers x += attention(norm(x)); x += mlp(norm(x)). With `rope` "paired" their
    heads turn by row and column, with the same frequencies for both; "alternating": with every second one each.
    `first_norm`: patches are normed before the first layer. The products of layers have biases where `biased` says so.
    A patch attends to the patches of its own frames: to all of them, or in layers that are not in `full_layers` to
    those in its window of `window_size`² pixels (0: no windows). `gated`: the MLP of a layer is
    down(act(gate(x)) * up(x)), else down(act(up(x))). `grid_side`: a patch has a learned position, of a square table
    with so many on a side that is spread over the picture (0: none), by "linear" `grid`, or "cubic",
    which is added behind the first norm. `class_token`: behind the patches of a picture goes a row that is no patch;
    what it begins with stands behind the table. `layer_scale`: what attention and MLP add is multiplied by a vector.

    In the end `merge_size`² neighbours are normed and become one vector of the model's hidden size. `merge` "joined":
    they are joined, and go through an MLP with gelu; "narrow": that is as wide inside as the model; "linear": a product
    does it; "reduced": a product makes them one as wide as a patch before the MLP; "averaged": their mean is normed
    again, and goes through one product; "gated": two products, a norm and gelu stand before a gated MLP that is
    `merge_width` wide. `merge_bias` is of these. `merge_norm` "joined": the norm is of all neighbours
    together, and None: there is none.
    What comes out of `deep_layers` is joined too, by MLPs with a norm over all that is joined, and added to the tokens
    behind the first layers of the language model (arXiv 2406.04334).

    `tokens_per_second` None: groups of frames are one position apart, whatever time lies between them. `frame_tokens`:
    each group of frames stands alone, between these two tokens, behind its time as text. `row_tokens`: each row of a
    picture ends with the first of these, the last row with the second. `ends`: a picture stands between these two
    and line breaks, and templates write the first alone. With `in_line` a picture's tokens have one position each, as
    text has; else `merge_size` says how they lie in time, height and width. `both_ways`: the tokens of a picture see
    each other, also those behind them. `side`: pictures have so many patches in each direction, whatever they were;
    `longest_edge`: pixels that they may have in one (0: any number). With `tiling` they are cut into pictures of that
    side: "nearest" into as many as fit their shape best, at most `most_tiles`; "grid" into those of their longest edge,
    as `longest_edge` says; the whole picture follows, and texts stand around them (see media.shown). `cropped`: what
    does not fit into the side is cut off. No `video_token_id`: there are no videos, unless templates write `video_text`
    for one. `frames_as_pictures`: groups of frames have the tokens of pictures, each before its time in `time_format`.
    `names`: whose spelling checkpoints have.
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
    video_token_id: int | None
    window_size: int = 0
    full_layers: tuple[int, ...] = ()
    tokens_per_second: float | None = None
    patch_bias: bool = False
    grid_side: int = 0
    deep_layers: tuple[int, ...] = ()
    frame_tokens: tuple[int, int] | None = None
    names: Literal["qwen", "siglip", "pixtral", "internvl", "clip", "idefics", "glm"] = "qwen"
    rope: Literal["paired", "alternating"] | None = "paired"
    first_norm: bool = False
    biased: bool = True
    class_token: bool = False
    layer_scale: bool = False
    grid: Literal["linear", "cubic"] = "linear"
    merge: Literal["joined", "narrow", "linear", "reduced", "averaged", "gated"] = "joined"
    merge_width: int = 0
    merge_norm: Literal["each", "joined"] | None = "each"
    merge_bias: bool = True
    merge_eps: float | None = None  # of its norms, where that is not `norm_eps`
    row_tokens: tuple[int, int] | None = None
    ends: tuple[int, int] | None = None
    in_line: bool = False
    both_ways: bool = False
    side: int = 0
    longest_edge: int = 0
    tiling: Literal["nearest", "grid"] | None = None
    most_tiles: int = 0
    cropped: bool = False
    video_text: str = ""
    frames_as_pictures: bool = False
    time_format: str = ""
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

    @property
    def takes_videos(self) -> bool:
        return self.video_token_id is not None or bool(self.video_text)

    @property
    def placeholder_id(self) -> int:
        """What stands for a picture in a rendered template."""
        return self.image_token_id if self.ends is None else self.ends[0]

    @property
    def at_once(self) -> int:
        """Tokens that must go through a step together: those of a picture that see each other."""
        return (self.side // self.merge_size) ** 2 if self.both_ways else 0

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """How many tokens a picture of t, h, w patches takes, those that end its rows included."""
        rows = 0 if self.row_tokens is None else grid[1] // self.merge_size
        return grid[0] * grid[1] * grid[2] // self.merge_size**2 + rows

    def placeholders(self, grid: tuple[int, int, int], *, video: bool = False) -> list[int]:
        """The tokens of a picture, or of a video."""
        kind = self.image_token_id
        if video and self.video_token_id is not None and not self.frames_as_pictures:
            kind = self.video_token_id
        if self.row_tokens is None:
            return [kind] * self.tokens(grid)
        row = [kind] * (grid[2] // self.merge_size) + [self.row_tokens[0]]
        rows = row * (grid[1] // self.merge_size)
        return [*rows[:-1], self.row_tokens[1]]

    def vector_places(self, grid: tuple[int, int, int]) -> npt.NDArray[np.int32]:
        """For each token of a picture its vector, or -1 for one that has its own embedding."""
        vectors = grid[0] * grid[1] * grid[2] // self.merge_size**2
        places = np.arange(vectors, dtype=np.int32)
        if self.row_tokens is None:
            return places
        return np.pad(places.reshape(-1, grid[2] // self.merge_size), ((0, 0), (0, 1)), constant_values=-1).ravel()

    def slots(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of the encoder with its shape; `hidden` is the width of the language model."""
        wide, inner, merged = self.hidden_size, self.intermediate_size, self.merged_size
        products = {"qkv": (3 * wide, wide), "o": (wide, wide), "up": (inner, wide), "down": (wide, inner)}
        if self.gated:
            products["gate"] = (inner, wide)
        norms = self._normed("attn_norm", "mlp_norm")
        layer = (_with_biases(products) if self.biased else products) | norms
        layer |= dict.fromkeys(("attn_scale", "mlp_scale"), (wide,)) if self.layer_scale else {}
        out: dict[str, tuple[int, ...]] = {"patch": (wide, self.patch_values)}
        out |= {"patch_bias": (wide,)} if self.patch_bias else {}
        out |= {"positions": (self.grid_side**2 + self.class_token, wide)} if self.grid_side else {}
        out |= self._normed("first_norm") if self.first_norm else {}
        for i in range(self.depth):
            out |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        into, between = {
            "joined": (merged, merged), "narrow": (merged, hidden), "linear": (0, merged),
            "reduced": (wide, hidden), "averaged": (0, wide), "gated": (0, 0),
        }[self.merge]  # fmt: skip
        merge: dict[str, tuple[int, ...]] = {"merge_up": (between, into)} if into else {}
        merge |= {"merge_down": (hidden, between)}
        if self.merge == "gated":
            merge = _with_biases({"merge_in": (hidden, merged), "mid_norm": (hidden,)})
            merge |= {"merge_gate": (self.merge_width, hidden), "merge_up": (self.merge_width, hidden)}
            merge |= {"merge_mid": (hidden, hidden), "merge_down": (hidden, self.merge_width)}
        if self.merge_bias:
            merge = _with_biases(merge)
        for i in range(len(self.deep_layers)):
            deep = merge | {"merge_norm": (merged,), "merge_norm_bias": (merged,)}
            out |= {f"deep.{i}.{name}": shape for name, shape in deep.items()}
        out |= {"merge_in": (wide, merged)} if self.merge == "reduced" else {}
        out |= {"mean_norm": (wide,)} if self.merge == "averaged" else {}
        if self.merge_norm:
            out |= self._normed("merge_norm", width=merged if self.merge_norm == "joined" else wide)
        return out | merge

    def _normed(self, *names: str, width: int = 0) -> dict[str, tuple[int, ...]]:
        norms: dict[str, tuple[int, ...]] = dict.fromkeys(names, (width or self.hidden_size,))
        return _with_biases(norms) if self.norm == "layer" else norms


def _with_biases(slots: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Each slot and its bias, which is as long as the slot's outputs."""
    return dict(slots) | {f"{name}_bias": shape[:1] for name, shape in slots.items()}
