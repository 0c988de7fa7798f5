"""Sends a vision encoder to the device, one matrix after the other: it is small beside its language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.vision_spec import Vision
from pagoda.backend.torch.convert import Converter, Target
from pagoda.backend.torch.norms import LayerNorm, RmsNorm
from pagoda.backend.torch.vision import Merger, Norm, Product, VisionEncoder, VisionLayer
from pagoda.backend.vision import MID_EPS
from pagoda.weights.source import Tensor as Stored


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "quick_gelu": _quick_gelu,
    }
)


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
            merger=self._merger("", self._vision.merge_eps),
            deep=tuple(self._merger(f"deep.{i}.") for i in range(len(self._vision.deep_layers))),
            first_norm=self._norm("first_norm") if self._vision.first_norm else None,
        )

    def _merger(self, p: str, eps: float | None = None) -> Merger:
        return Merger(
            self._norm(p + "merge_norm", eps) if self._has(p + "merge_norm") else None,
            self._product(p + "merge_down"),
            self._vision.merged_size,
            up=self._product(p + "merge_up") if self._has(p + "merge_up") else None,
            first=self._product(p + "merge_in") if self._has(p + "merge_in") else None,
            mean_norm=self._norm(p + "mean_norm", eps) if self._has(p + "mean_norm") else None,
            middle=self._middle(p) if self._has(p + "merge_mid") else None,
            gate=self._product(p + "merge_gate") if self._has(p + "merge_gate") else None,
        )

    def _middle(self, p: str) -> Callable[[Tensor], Tensor]:
        product, norm = self._product(p + "merge_mid"), self._norm(p + "mid_norm", MID_EPS)
        return lambda x: F.gelu(norm(product(x)))

    def _layer(self, p: str) -> VisionLayer:
        return VisionLayer(
            attn_norm=self._norm(p + "attn_norm"),
            qkv=self._product(p + "qkv"),
            o=self._product(p + "o"),
            mlp_norm=self._norm(p + "mlp_norm"),
            gate=self._product(p + "gate") if self._vision.gated else None,
            up=self._product(p + "up"),
            down=self._product(p + "down"),
            activation=_ACTIVATIONS[self._vision.activation],
            attn_scale=self._floats(p + "attn_scale") if self._vision.layer_scale else None,
            mlp_scale=self._floats(p + "mlp_scale") if self._vision.layer_scale else None,
        )

    def _product(self, slot: str) -> Product:
        return Product(self._floats(slot), self._floats(slot + "_bias") if self._has(slot + "_bias") else None)

    def _norm(self, slot: str, eps: float | None = None) -> Norm:
        weight, eps = self._floats(slot).float(), eps or self._vision.norm_eps
        if not self._has(slot + "_bias"):
            return RmsNorm(weight, eps)
        return LayerNorm(weight, self._floats(slot + "_bias").float(), eps)

    def _has(self, slot: str) -> bool:
        return f"vision.{slot}" in self._tensors

    def _floats(self, slot: str) -> Tensor:
        return self._converter.floats(self._tensors[f"vision.{slot}"], self._target.dtype)
