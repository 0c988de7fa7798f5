"""Streams a checkpoint onto the device, one layer at a time by a few threads, and builds the decoder."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from pagoda.arch.latent import Latent
from pagoda.arch.mamba import Mamba
from pagoda.arch.memory import encoded_bytes
from pagoda.arch.recurrence import Recurrence
from pagoda.arch.short_conv import ShortConv
from pagoda.arch.spec import Experts, Layer, Mlp, ModelSpec
from pagoda.backend.base import Progress
from pagoda.backend.torch.adapters import Adapted, Adapters
from pagoda.backend.torch.batch import Heads
from pagoda.backend.torch.convert import FLOATS, Converter, Target
from pagoda.backend.torch.delta import Convolution, Delta, StateSpace
from pagoda.backend.torch.join import side_by_side
from pagoda.backend.torch.latent import LatentAttention
from pagoda.backend.torch.load_vision import VisionLoader
from pagoda.backend.torch.model import (
    Decoder,
    DecoderLayer,
    ExpertBiases,
    GatedMlp,
    Linear,
    Mixture,
    PlainMlp,
    Table,
    ThreePositions,
)
from pagoda.backend.torch.norms import LayerNorm, NoNorm, Norm, RmsNorm
from pagoda.backend.torch.own import Beside, LayerValues, Own
from pagoda.backend.torch.packs import Dense, Weight
from pagoda.backend.torch.vision import Sight
from pagoda.errors import ModelError
from pagoda.weights.grouped import MadeTensor
from pagoda.weights.source import Tensor as Stored

_THREADS = 6
"""Enough to read a fast disk; each holds a pinned buffer and converts a matrix of its own."""


class Loader:
    def __init__(
        self, spec: ModelSpec, tensors: Mapping[str, Stored], target: Target, adapters: Adapters | None = None
    ) -> None:
        """`adapters`: that steps may use."""
        self._spec, self._tensors, self._target, self._adapters = spec, tensors, target, adapters
        self._local = threading.local()

    @property
    def _converter(self) -> Converter:
        if not hasattr(self._local, "converter"):
            self._local.converter = Converter(self._target)
        converter: Converter = self._local.converter
        return converter

    def decoder(self, max_model_len: int, progress: Progress | None) -> Decoder:
        spec = self._spec
        layers: list[DecoderLayer] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                ends = pool.submit(self._ends)
                for layer in pool.map(self._layer, range(len(spec.layers)), spec.layers):
                    layers.append(layer)
                    if progress:
                        progress("weights", len(layers) / len(spec.layers))
                embed, norm, head = ends.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        cos_sin = self._turns(max_model_len)
        positions = self._table("positions") if spec.positions else None
        three, sight = self._three(), self._sight(max_model_len)
        scales = None
        if spec.rope.query_beta:
            scales = torch.from_numpy(spec.rope.query_scales(np.arange(max_model_len))).to(self._target.device)
        words = Table(embed, spec.embed_scale)
        return Decoder(
            spec, words, norm, head, tuple(layers), cos_sin, [], positions, three, sight, scales, self._adapters,
            self._layer_values(),
        )  # fmt: skip

    def _layer_values(self) -> LayerValues | None:
        """A product over the root of its inputs is normed as the product with an epsilon that is as much larger."""
        spec = self._spec
        if not spec.layer_embed:
            return None
        norm = RmsNorm(self._vector("layer_project_norm") * 2**-0.5, spec.norm_eps * spec.hidden_size)
        token = -1 if spec.vision is None else spec.vision.image_token_id
        scale = (spec.layer_embed / 2) ** 0.5
        return LayerValues(self._table("layer_embed"), scale, Linear((self._weight("layer_project"),)), norm, token)

    def _own(self, p: str) -> Own | None:
        if not self._spec.layer_embed:
            return None
        gate, out = (Linear((self._weight(p + name),)) for name in ("own_gate", "own_out"))
        return Own(gate, out, self._norm(p + "own_post_norm"))

    def _turns(self, max_model_len: int) -> tuple[Tensor, ...]:
        """Cosines and sines, [positions, rope dim], of each rope."""
        tables = [np.concatenate(rope.tables(max_model_len), axis=1) for rope in self._spec.ropes]
        return tuple(torch.from_numpy(table).to(self._target.device) for table in tables)

    def _three(self) -> ThreePositions | None:
        rope, device = self._spec.rope, self._target.device
        if not rope.sections:
            return None
        inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64, device=device)
        return ThreePositions(torch.from_numpy(rope.axes()).to(device), inv_freq, rope.attention_factor)

    def _sight(self, max_model_len: int) -> Sight | None:
        vision = self._spec.vision
        if vision is None:
            return None
        kept_bytes = encoded_bytes(self._spec, max_model_len, self._target.dtype.itemsize)
        return Sight(VisionLoader(vision, self._tensors, self._target).encoder(), kept_bytes)

    def _ends(self) -> tuple[Tensor, Norm, Linear]:
        spec = self._spec
        embed = self._table("embed")
        own = not spec.tied and spec.pooling is None
        bias = self._table("head_bias") * spec.logit_scale if spec.head_bias else None
        head = Linear((self._head() if own else Dense(embed),), bias)
        return embed, self._norm("norm", spec.logit_scale), head

    def _head(self) -> Weight:
        """Quantized where it is stored so; rounding it on load costs more than it saves."""
        tensor = self._tensors["head"]
        if tensor.type in FLOATS and not isinstance(tensor, MadeTensor):
            return Dense(self._table("head"))
        return self._converter.weight(tensor)

    def _layer(self, index: int, layer: Layer) -> DecoderLayer:
        p, a = f"layers.{index}.", layer.attention
        shape = Heads(
            a.heads,
            a.kv_heads,
            a.head_dim,
            a.scale,
            a.window,
            self._spec.norm_eps,
            self._spec.rope.interleaved,
            a.rope,
            a.local,
            a.soft_cap,
            a.qk_norm_late,
            a.turned,
            a.v_norm,
            a.source is None,
        )
        latent = None if a.latent is None else self._latent(p, a.latent, shape)
        products: tuple[str, ...] = ("q", "k", "v") + (("q_gate",) if a.out_gate else ())
        products = products if a.source is None else ("q",)
        if layer.delta is not None:
            products = layer.delta.PRODUCTS
        elif a.latent is not None:
            products = ("q_a" if a.latent.q_rank else "q", "kv_a")
        return DecoderLayer(
            heads=shape,
            attn_norm=self._norm(p + "attn_norm"),
            qkv=self._linear(*(p + name for name in products)),
            q_norm=self._vector(p + "q_norm") if p + "q_norm" in self._tensors else None,
            k_norm=self._vector(p + "k_norm") if p + "k_norm" in self._tensors else None,
            o=self._linear(p + "o"),
            attn_post_norm=self._norm(p + "attn_post_norm"),
            mlp_norm=None if layer.norms == "one" or not layer.mlp.size else self._norm(p + "mlp_norm"),
            beside=layer.norms in ("one", "beside"),
            mlp=self._mlp(p, layer.mlp) if layer.mlp.size else None,
            mlp_post_norm=self._norm(p + "mlp_post_norm"),
            sinks=self._vector(p + "sinks") if a.sinks else None,
            delta=None if layer.delta is None else self._delta(p, layer.delta),
            out_gate=a.out_gate,
            latent=latent,
            own=self._own(p),
            scale=float(self._vector(p + "scale")[0]) if layer.scaled else 1.0,
        )

    def _latent(self, p: str, shape: Latent, heads: Heads) -> LatentAttention:
        eps, norm, q_b = self._spec.inner_eps, None, None
        if shape.q_rank:
            norm, q_b = RmsNorm(self._vector(p + "q_a_norm"), eps), self._weight(p + "q_b")
        own = RmsNorm(self._vector(p + "kv_a_norm"), eps)
        return LatentAttention(shape, heads, own, self._table(p + "k_b"), self._table(p + "v_b"), norm, q_b)

    def _delta(self, p: str, shape: Recurrence) -> Delta | Convolution | StateSpace:
        if isinstance(shape, ShortConv):
            return Convolution(shape, self._vector(p + "u_conv").t().contiguous())
        taps = torch.cat([self._vector(f"{p}{letter}_conv") for letter in "qkv"]).t().contiguous()
        rate, dt, norm = (self._vector(p + name) for name in ("rate", "dt", "z_norm"))
        if isinstance(shape, Mamba):
            biases = [self._vector(f"{p}{letter}_conv_bias") for letter in "qkv"] if shape.conv_bias else []
            bias = torch.cat(biases) if biases else torch.zeros_like(taps[0])
            return StateSpace(shape, taps, bias, rate, dt, self._vector(p + "skip"), norm)
        return Delta(shape, taps, rate, dt, norm, self._spec.norm_eps)

    def _mlp(self, p: str, mlp: Mlp) -> GatedMlp | PlainMlp | Mixture | Beside:
        if mlp.experts is not None and mlp.experts.own_norms:
            return self._beside(p, mlp.experts)
        clamped = mlp.activation == "clamped_swiglu" and mlp.experts is not None and mlp.bias
        known = ("gelu", "gelu_tanh", "relu2") if not mlp.gated else ("silu",) if mlp.experts else ("silu", "gelu_tanh")
        if not clamped and mlp.activation not in known:
            raise ModelError(f"the PyTorch backend has no activation {mlp.activation!r} here")
        if not mlp.gated:
            return self._plain_mlp(p, mlp) if mlp.experts is None else self._squared_mixture(p, mlp.experts)
        if mlp.experts is None:
            gelu = mlp.activation == "gelu_tanh"
            return GatedMlp(self._linear(p + "gate", p + "up"), self._linear(p + "down"), gelu)
        gate, up, down = (self._weight(f"{p}{part}_experts") for part in ("gate", "up", "down"))
        router = self._table(p + "router")
        stack = side_by_side([gate, up])
        choice = self._vector(p + "router_choice_bias") if mlp.experts.choice_bias else None
        biases = self._biases(p) if clamped else None
        if not mlp.experts.shared:
            return Mixture(mlp.experts, router, stack, down, biases=biases, choice_bias=choice)
        shared = GatedMlp(self._linear(p + "gate_shared", p + "up_shared"), self._linear(p + "down_shared"))
        own = self._table(p + "router_shared")[None] if mlp.experts.shared_gate else None
        return Mixture(mlp.experts, router, stack, down, shared, own, biases, choice)

    def _beside(self, p: str, experts: Experts) -> Beside:
        gate, up, down = (self._weight(f"{p}{part}_experts") for part in ("gate", "up", "down"))
        gate_up = self._linear(p + "gate_shared", p + "up_shared")
        shared = GatedMlp(gate_up, self._linear(p + "down_shared"), gelu=True)
        ahead = (self._norm(f"{p}{name}_norm") for name in ("router", "experts", "shared"))
        behind = (self._norm(f"{p}{name}_post_norm") for name in ("experts", "shared"))
        router, shares = self._table(p + "router"), self._vector(p + "router_scale")
        stack = side_by_side([gate, up])
        return Beside(experts, router, shares, stack, down, shared, tuple(ahead), tuple(behind))

    def _squared_mixture(self, p: str, experts: Experts) -> Mixture:
        up, down = (self._weight(f"{p}{part}_experts") for part in ("up", "down"))
        choice = self._vector(p + "router_choice_bias") if experts.choice_bias else None
        shared = None
        if experts.shared:
            shared = PlainMlp(self._linear(p + "up_shared"), self._linear(p + "down_shared"), "relu2")
        return Mixture(experts, self._table(p + "router"), (up,), down, shared, choice_bias=choice, squared=True)

    def _biases(self, p: str) -> ExpertBiases:
        router, *gate_up = (self._table(f"{p}{part}_bias") for part in ("router", "gate_experts", "up_experts"))
        down = p + "down_experts_bias"
        experts, hidden = len(router), self._spec.hidden_size
        zeros = torch.zeros(experts, hidden, dtype=router.dtype, device=router.device)
        return ExpertBiases(router, torch.cat(gate_up, -1), self._table(down) if down in self._tensors else zeros)

    def _plain_mlp(self, p: str, mlp: Mlp) -> PlainMlp:
        return PlainMlp(self._linear(p + "up"), self._linear(p + "down"), mlp.activation)

    def _linear(self, *slots: str) -> Linear:
        parts = side_by_side([self._weight(slot) for slot in slots])
        biases = [slot + "_bias" for slot in slots if slot + "_bias" in self._tensors]
        bias = [self._table(slot) for slot in biases]
        return Linear(parts, torch.cat(bias) if bias else None, self._adapted(slots))

    def _adapted(self, slots: Sequence[str]) -> Adapted | None:
        if self._adapters is None:
            return None
        ends = list(accumulate((self._tensors[slot].shape[0] for slot in slots), initial=0))
        return Adapted(self._adapters, tuple(zip(slots, ends, ends[1:], strict=False)))

    def _weight(self, slot: str) -> Weight:
        return self._converter.weight(self._tensors[slot], slot)

    def _vector(self, slot: str) -> Tensor:
        return self._converter.floats(self._tensors[slot], torch.float32)

    def _table(self, slot: str) -> Tensor:
        return self._converter.floats(self._tensors[slot], self._target.dtype)

    def _norm(self, slot: str, scale: float = 1.0) -> Norm:
        """What scales the logits scales the last norm just as well."""
        if slot not in self._tensors:
            return NoNorm()
        weight, eps = self._vector(slot) * scale, self._spec.norm_eps
        if self._spec.norm == "layer":
            bias = self._vector(slot + "_bias") * scale if self._spec.norm_bias else None
            return LayerNorm(weight, bias, eps)
        return RmsNorm(weight, eps)
