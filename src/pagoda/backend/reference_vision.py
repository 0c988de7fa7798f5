"""What a model that sees means, in plain numpy and float32: the encoder of one image, and its vectors among tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from pagoda.arch.memory import KvType, encoded_bytes
from pagoda.arch.spec import ModelSpec, Rope
from pagoda.arch.vision_spec import Vision
from pagoda.backend.activations import ACTIVATIONS, gelu
from pagoda.backend.reference import ReferenceExecutor, rotate, softmax
from pagoda.backend.reference_product import matmul
from pagoda.backend.rows import Index
from pagoda.backend.vision import MID_EPS, Encoded, cubic_positions, grid_taps, layout, patches, vectors_taken
from pagoda.types import Float32, Image, Int32, PlannedImage, StepPlan


def quick_gelu(x: Float32) -> Float32:
    return np.asarray(x / (1 + np.exp(np.float32(-1.702) * x)))


_ACTIVATIONS = MappingProxyType({**ACTIVATIONS, "quick_gelu": quick_gelu})


class ReferenceVision(ReferenceExecutor):
    """A ReferenceExecutor whose tokens may be parts of images."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Float32],
        *,
        num_blocks: int,
        max_model_len: int,
        max_num_seqs: int = 0,
        kept_states: int = 0,
        activation_bytes: int = 0,
        kv_type: KvType = "float32",
    ) -> None:
        super().__init__(
            spec,
            weights,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kept_states=kept_states,
            activation_bytes=activation_bytes,
            kv_type=kv_type,
        )
        if spec.vision is None:
            raise ValueError("this model has no vision encoder")
        self.encoder = ReferenceImages(spec.vision, weights)
        self._encoded: Encoded[Float32] = Encoded(
            encoded_bytes(spec, max_model_len), lambda image: lambda _: self.encoder.encode(image)
        )

    def embed(self, plan: StepPlan) -> Float32:
        x = super().embed(plan)
        for part in plan.images:
            rows, vectors = self.vectors(part, 0)
            x[rows] = vectors
        return x

    def added(self, i: int, x: Float32, plan: StepPlan) -> Float32:
        if 0 < i < self.encoder.vision.vectors:
            x = x.copy()
            for part in plan.images:
                rows, vectors = self.vectors(part, i)
                x[rows] += vectors
        return x

    def vectors(self, part: PlannedImage, place: int) -> tuple[Index, Float32]:
        """Rows of a step, and the vectors that they take: of those that each token has the one at a place."""
        rows, which = vectors_taken(part, self.encoder.vision)
        return rows, np.split(self._encoded.vectors(part.image)[which], self.encoder.vision.vectors, axis=1)[place]

    def encoded(self, image: Image, most_s: float) -> bool:
        return self._encoded.ready(image, most_s)

    def close(self) -> None:
        super().close()
        self._encoded.clear()


class ReferenceImages:
    """The vision encoder alone; `weights` are those of the model."""

    def __init__(self, vision: Vision, weights: Mapping[str, Float32]) -> None:
        self.vision = vision
        self.weights = weights

    def encode(self, image: Image) -> Float32:
        """The vectors that stand for an image, those of a token [tokens, ...] side by side."""
        v, place = self.vision, layout(image.grid, self.vision)
        turns = place.turns(v)
        together = patches(image, v).reshape(len(place.order), -1)[place.order]
        x = matmul(together.reshape(-1, v.patch_values), self.weights["vision.patch"])
        x += self.weights.get("vision.patch_bias", 0)
        if v.grid_side and v.grid == "linear":
            taps, shares = grid_taps(place, image.grid, v.grid_side)
            x += (self.weights["vision.positions"][taps] * shares[:, :, None]).sum(axis=1)
        if v.class_token:
            x = np.concatenate([x, self.weights["vision.positions"][-1:]])
        if v.first_norm:
            x = self.norm("vision.first_norm", x)
        if v.grid == "cubic":
            x = x + cubic_positions(self.weights["vision.positions"], place, image.grid)
        deep: list[Float32] = []
        for i in range(v.depth):
            name = f"vision.layers.{i}."
            segments = place.frames if v.sees_all(i) else place.windows
            seen = self.attention(name, self.norm(name + "attn_norm", x), turns, segments)
            x = x + seen * self.weights.get(name + "attn_scale", 1)
            x = x + self.mlp(name, self.norm(name + "mlp_norm", x)) * self.weights.get(name + "mlp_scale", 1)
            if i in v.deep_layers:
                name = f"vision.deep.{len(deep)}."
                deep.append(self.merged(name, self.norm(name + "merge_norm", x.reshape(-1, v.merged_size))))
        vectors = np.concatenate([self.merged("vision.", self.joined(x[: place.patches])), *deep], axis=1)
        out = np.empty_like(vectors)
        out[place.order] = vectors
        return out

    def joined(self, x: Float32) -> Float32:
        """The patches of each token side by side, normed."""
        v = self.vision
        if v.merge_norm == "each":
            x = self.norm("vision.merge_norm", x, v.merge_eps)
        x = x.reshape(-1, v.merged_size)
        return self.norm("vision.merge_norm", x, v.merge_eps) if v.merge_norm == "joined" else x

    def merged(self, name: str, x: Float32) -> Float32:
        """Of the patches of each token, side by side, its vector."""
        v = self.vision
        if v.merge == "averaged":
            x = self.norm(name + "mean_norm", x.reshape(len(x), -1, v.hidden_size).mean(axis=1), v.merge_eps)
            return self.linear(name + "merge_down", x)
        if v.merge == "linear":
            return self.linear(name + "merge_down", x)
        if v.merge == "gated":
            x = self.linear(name + "merge_mid", self.linear(name + "merge_in", x))
            x = gelu(self.norm(name + "mid_norm", x, MID_EPS))
            gate = _ACTIVATIONS["silu"](self.linear(name + "merge_gate", x))
            return self.linear(name + "merge_down", gate * self.linear(name + "merge_up", x))
        if v.merge == "reduced":
            x = self.linear(name + "merge_in", x)
        return self.linear(name + "merge_down", gelu(self.linear(name + "merge_up", x)))

    def attention(self, name: str, x: Float32, turns: tuple[Float32, Float32], segments: Int32) -> Float32:
        """Every patch over all patches of its segment."""
        heads, size = self.vision.heads, self.vision.head_dim
        q, k, v = self.linear(name + "qkv", x).reshape(-1, 3, heads, size).transpose(1, 0, 2, 3)
        if self.vision.rope:
            q, k = rotate_halves(q, *turns), rotate_halves(k, *turns)
        out = np.empty_like(q)
        for first, last in pairwise(segments):
            part = slice(first, last)
            scores = q[part].transpose(1, 0, 2) @ k[part].transpose(1, 2, 0) * np.float32(size**-0.5)
            out[part] = (softmax(scores) @ v[part].transpose(1, 0, 2)).transpose(1, 0, 2)
        return self.linear(name + "o", out.reshape(len(x), -1))

    def mlp(self, name: str, x: Float32) -> Float32:
        up = self.linear(name + "up", x)
        if self.vision.gated:
            return self.linear(name + "down", _ACTIVATIONS[self.vision.activation](self.linear(name + "gate", x)) * up)
        return self.linear(name + "down", _ACTIVATIONS[self.vision.activation](up))

    def linear(self, slot: str, x: Float32) -> Float32:
        return np.asarray(matmul(x, self.weights[slot]) + self.weights.get(slot + "_bias", 0))

    def norm(self, slot: str, x: Float32, eps: float | None = None) -> Float32:
        """RMS norm, or with a bias layer norm."""
        bias = self.weights.get(slot + "_bias")
        if bias is not None:
            x = x - x.mean(axis=-1, keepdims=True)
        y = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(eps or self.vision.norm_eps))
        return np.asarray(y * self.weights[slot] + (0 if bias is None else bias))


def rotate_halves(x: Float32, cos: Float32, sin: Float32) -> Float32:
    """Turn the pairs (i, i + head size / 2) of whole heads."""
    return rotate(x, cos, sin, Rope(x.shape[-1], ()))
