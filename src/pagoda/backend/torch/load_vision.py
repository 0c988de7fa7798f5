"""Sends a vision encoder to the device, one matrix after the other: it is small beside its language model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pagoda.arch.vision_spec import Vision
from pagoda.backend.torch.convert import Converter, Target
from pagoda.backend.torch.norms import LayerNorm, RmsNorm
from pagoda.backend.torch.vision import Merger, Norm, Product, VisionEncoder, VisionLayer
from pagoda.weights.source import Tensor as Stored


class VisionLoader:
    def __init__(self, vision: Vision, tensors: Mapping[str, Stored], target: Target) -> None:
        self._vision, self._tensors, self._target = vision, tensors, target
        self._converter = Converter(target)

    def encoder(self) -> VisionEncoder:
        return VisionEncoder(
            vision=self._vision,
            patch=self._product("patch"),
            layers=tuple(self._layer(f"layers.{i}.") for i in range(self._vision.depth)),
            positions=self._floats("positions") if self._vision.grid_side else None,
            merger=self._merger(""),
            deep=tuple(self._merger(f"deep.{i}.") for i in range(len(self._vision.deep_layers))),
        )

    def _merger(self, p: str) -> Merger:
        up, down = self._product(p + "merge_up"), self._product(p + "merge_down")
        return Merger(self._norm(p + "merge_norm"), up, down, self._vision.merged_size)

    def _layer(self, p: str) -> VisionLayer:
        return VisionLayer(
            attn_norm=self._norm(p + "attn_norm"),
            qkv=self._product(p + "qkv"),
            o=self._product(p + "o"),
            mlp_norm=self._norm(p + "mlp_norm"),
            gate=self._product(p + "gate") if self._vision.gated else None,
            up=self._product(p + "up"),
            down=self._product(p + "down"),
            by_tanh=self._vision.activation == "gelu_tanh",
        )

    def _product(self, slot: str) -> Product:
        return Product(self._floats(slot), self._floats(slot + "_bias") if self._has(slot + "_bias") else None)

    def _norm(self, slot: str) -> Norm:
        weight = self._floats(slot).float()
        if not self._has(slot + "_bias"):
            return RmsNorm(weight, self._vision.norm_eps)
        return LayerNorm(weight, self._floats(slot + "_bias").float(), self._vision.norm_eps)

    def _has(self, slot: str) -> bool:
        return f"vision.{slot}" in self._tensors

    def _floats(self, slot: str) -> Tensor:
        return self._converter.floats(self._tensors[f"vision.{slot}"], self._target.dtype)
