"""From a ModelSpec and its tensors to the native program: weights repacked, a flat list of operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from pagoda.arch.latent import Latent as LatentAttention
from pagoda.arch.mamba import Mamba
from pagoda.arch.spec import Attention, Experts, Layer, Mlp, ModelSpec
from pagoda.backend.base import Progress
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.buffers import (
    ATT,
    CHOSEN,
    LAST,
    LAST_ATT,
    LAST_NORMED,
    LAST_VALUES,
    LAYER_VALUES,
    LOGITS,
    MAX_ROWS,
    MET,
    MIXED,
    Q_A,
    QKV,
    ROUTER,
    SHARED,
    SHARED_GATE_UP,
    SUMS,
    Buffers,
    H,
    Q,
    X,
    buffer_shapes,
    buffers_of,
    dense_sizes,
    mixture_of,
    narrow_end,
)
from pagoda.backend.cpu.delta_program import check_delta, delta_dims, of_heads, state_space, taps
from pagoda.backend.cpu.kinds import cached_layers, check_kinds, local_heads, main_attention, place_of
from pagoda.backend.cpu.library import Native
from pagoda.backend.cpu.own_program import layer_values, mixture_beside, norm_scale, own_part
from pagoda.backend.cpu.panels import FUSED, in_their_order, panel_type, runnable
from pagoda.backend.cpu.records import Dims, Latent, Op, Router
from pagoda.errors import ModelError
from pagoda.weights.files import drop_pages
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import part_of_stack
from pagoda.weights.source import Tensor

VECTORS = ("positions", "types", "score", "pool_dense")
"""Tables that are added, or used for a whole request at once: kept in float32."""

_VECTORS_OF_LAYERS = (
    *("attn_norm", "attn_norm_bias", "attn_post_norm", "mlp_norm", "mlp_norm_bias", "mlp_post_norm"),
    *("q_norm", "k_norm", "q_a_norm", "kv_a_norm", "sinks", "router_shared", "router_choice_bias", "router_scale"),
    *("router_norm", "experts_norm", "experts_post_norm", "shared_norm", "shared_post_norm", "own_post_norm"),
    "down_bias",
)

ACTIVATIONS = MappingProxyType(
    {
        ("silu", True): native.SILU,
        ("gelu", False): native.GELU,
        ("gelu", True): native.GATED_GELU,
        ("gelu_tanh", False): native.GELU_TANH,
        ("gelu_tanh", True): native.GATED_GELU_TANH,
        ("relu2", False): native.RELU2,
        ("quick_gelu", False): native.QUICK_GELU,
    }
)
"""The operation behind the first product of an MLP, by the function and whether there is a gate."""

EXPERT_FLAGS = MappingProxyType(
    {
        ("silu", True): 0,
        ("clamped_swiglu", True): native.CLAMPED,
        ("gelu_tanh", True): native.GELU_UP,
        ("relu2", False): native.SQUARED,
    }
)
"""Of the first products of experts, by their function, and whether there is a gate."""


class Program:
    """Builds the operations of one model into `lib`. Buffers: see the constants above."""

    def __init__(
        self,
        lib: Native,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        progress: Progress | None,
        quantization: str | None = None,
        adapts: bool = False,
    ) -> None:
        """`adapts`: steps may have adapters."""
        self._lib, self._spec, self._adapts = lib, spec, adapts
        self._tensors, orders = in_their_order(tensors)
        self._panel_types = {s: panel_type(s, t, quantization) for s, t in self._tensors.items() if len(t.shape) > 1}
        self._progress = progress or (lambda phase, share: None)
        self._ops: list[Op] = []
        check_spec(spec)
        self._orders = {name: lib.order(order) for name, order in orders.items()}
        self._weights()

    def _weights(self) -> None:
        """Repack everything; self.ids: slot or fused name -> id of the weight or vector."""
        ids: dict[str, int] = {"embed": self._matrix("embed")}
        # what scales the logits scales the last norm just as well
        scales = dict.fromkeys(("norm", "norm_bias", "head_bias"), self._spec.logit_scale) | {"positions": 1.0}
        ids |= {name: self._vector(name, scale=scale) for name, scale in scales.items() if name in self._tensors}
        if self._spec.layer_embed:
            ids |= {name: self._matrix(name) for name in ("layer_embed", "layer_project")}
            ids["layer_project_norm"] = self._vector("layer_project_norm", scale=norm_scale())
        if self._spec.pooling is None:
            ids["head"] = ids["embed"] if self._spec.tied else self._matrix("head")
        for i, layer in enumerate(self._spec.layers):
            p = f"layers.{i}."
            for name in ("qkv", "o"):
                ids[p + name] = self._matrix(*(p + s for s in FUSED[name] if p + s in self._tensors))
            if layer.attention.latent is not None:
                ids |= {p + name: self._experts(p + name) for name in ("k_b", "v_b")}
                if p + "q_b" in self._tensors:
                    ids[p + "q_b"] = self._matrix(p + "q_b")
            if layer.delta is not None:
                ids[p + "taps"] = self._lib.vector(taps(self._tensors, p))
                if isinstance(layer.delta, Mamba):
                    ids[p + "z_norm"] = self._vector(p + "z_norm")
                if p + "rate" in self._tensors:
                    ids[p + "of_heads"] = self._lib.vector(of_heads(self._tensors, p))
            if layer.mlp.experts is None and layer.mlp.size:
                ids[p + "gate_up"] = self._matrix(*(p + s for s in _inner(layer)))
                ids[p + "down"] = self._matrix(p + "down")
            elif layer.mlp.experts is not None:
                ids[p + "router"] = self._matrix(p + "router")
                ids[p + "gate_up_experts"] = self._experts(*(f"{p}{s}_experts" for s in _inner(layer)))
                ids[p + "down_experts"] = self._experts(p + "down_experts")
                if layer.mlp.bias:
                    ids[p + "router_bias"] = self._vector(p + "router_bias")
                    ids[p + "gate_up_experts_bias"] = self._vector(p + "gate_experts_bias", p + "up_experts_bias")
                    ids[p + "down_experts_bias"] = self._vector(p + "down_experts_bias")
                if layer.mlp.experts.shared:
                    ids[p + "gate_up_shared"] = self._matrix(*(f"{p}{s}_shared" for s in _inner(layer)))
                    ids[p + "down_shared"] = self._matrix(p + "down_shared")
            if self._spec.layer_embed:
                ids |= {p + name: self._matrix(p + name) for name in ("own_gate", "own_out")}
            for name in _VECTORS_OF_LAYERS:
                if p + name in self._tensors:
                    ids[p + name] = self._vector(p + name)
            if layer.attention.qkv_bias and layer.delta is None:
                ids[p + "qkv_bias"] = self._vector(p + "q_bias", p + "k_bias", p + "v_bias")
            if layer.attention.out_bias and layer.delta is None:
                ids[p + "o_bias"] = self._vector(p + "o_bias")
            if layer.mlp.bias and layer.mlp.experts is None:
                ids[p + "gate_up_bias"] = self._vector(*(p + s + "_bias" for s in _inner(layer)))
            self._progress("weights", (i + 1) / len(self._spec.layers))
        self.ids = ids

    def _matrix(self, *slots: str) -> int:
        return self._stack([self._tensors[s] for s in slots], slots)

    def _experts(self, *slots: str) -> int:
        """The matrices of the first expert, those of the second, ...; or of the heads."""
        weight = -1
        for expert in range(self._tensors[slots[0]].shape[0]):
            weight = self._stack([part_of_stack(self._tensors[s], expert) for s in slots], slots, weight)
        return weight

    def _stack(self, tensors: Sequence[Tensor], slots: Sequence[str], behind: int = -1) -> int:
        ready = [runnable(t, self._panel_types[s]) for s, t in zip(slots, tensors, strict=True)]
        parts = [(t.data, t.shape[0], t.shape[1], t.type) for t in ready]
        weight = self._lib.weight(parts, [self._panel_types[s] for s in slots], behind)
        drop_pages(tensors)  # so that the whole model is never there twice
        return weight

    def _vector(self, *slots: str, scale: float = 1.0) -> int:
        """One behind the other; of experts those of the first, then those of the second, ..."""
        values = np.concatenate([dequantize(self._tensors[s]) for s in slots], axis=-1).ravel() * np.float32(scale)
        return self._lib.vector(np.ascontiguousarray(values, dtype=np.float32))

    def finish(self, max_tokens: int, num_blocks: int, kv: int = native.KV_F16, states: int = 0) -> None:
        """Fix the program with its buffers and a KV cache of num_blocks blocks. Raises MemoryShort.

        `states` of requests have room at once, of models that keep such.
        """
        spec = self._spec
        attention = main_attention(spec)
        inv_freq: npt.NDArray[np.float64] = np.asarray(spec.rope.inv_freq, dtype=np.float64)
        axes = spec.rope.axes().astype(np.int32)
        layers = 0 if spec.encoder is not None else cached_layers(spec, local=False)
        dims = Dims(
            layers, attention.heads, attention.kv_heads, attention.head_dim, spec.vocab_size, max_tokens,
            MAX_ROWS, num_blocks, spec.rope.dim, int(spec.rope.interleaved), spec.rope.attention_factor,
            inv_freq.ctypes.data, kv, _router(spec), 0, axes.ctypes.data if spec.rope.sections else None,
            delta_dims(spec, states),
        )  # fmt: skip
        if attention.latent is not None:
            dims.latent = Latent(attention.latent.rank, attention.latent.nope, attention.latent.value_dim)
        dims.local = local_heads(spec)
        dims.query_beta, dims.query_length = spec.rope.query_beta, spec.rope.query_length
        if spec.local_rope is not None:
            local: npt.NDArray[np.float64] = np.asarray(spec.local_rope.inv_freq, dtype=np.float64)
            dims.local_inv_freq, dims.local_factor = local.ctypes.data, spec.local_rope.attention_factor
        hidden = spec.hidden_size if spec.pooling is not None else 0
        self._lib.program(dims, buffer_shapes(spec), self._operations(), hidden)

    def _operations(self) -> list[Op]:
        self._ops = []
        rows = native.LOGIT_ROWS
        self._emit(native.EMBED, out=X, weight="embed", f=self._spec.embed_scale)
        if self._spec.positions:
            self._emit(native.POSITIONS, out=X, vector="positions")
        if self._spec.layer_embed:
            layer_values(self._spec, self._emit)
        for i, layer in enumerate(self._spec.layers):
            if self._spec.vision is not None and 0 < i < self._spec.vision.vectors:
                self._emit(native.ADD_VECTORS, out=X, layer=i)
            if i + 1 < len(self._spec.layers) or not narrow_end(self._spec):
                self._mixer(i, layer, f"layers.{i}.o")
                self._rest(i, layer, buffers_of(self._spec, i))
                continue
            # behind the last attention only rows that want logits go on
            self._mixer(i, layer)
            self._emit(native.GATHER, in_=X, out=LAST, flags=rows)
            mixed = buffers_of(self._spec, i).att
            self._emit(native.GATHER, in_=mixed, out=LAST_ATT, flags=rows, order=f"layers.{i}.o")
            if self._spec.layer_embed:
                self._emit(native.GATHER, in_=LAYER_VALUES, out=LAST_VALUES, flags=rows)
            self._rest(i, layer, LOGITS)
        if not narrow_end(self._spec):
            self._emit(native.GATHER, in_=X, out=LAST, flags=rows)
        self._norm("norm", LAST, LAST_NORMED, flags=rows)
        if self._spec.pooling is None:
            cap = self._spec.logit_soft_cap or 0
            self._emit(native.HEAD, in_=LAST_NORMED, weight="head", vector="head_bias", flags=rows, f2=cap)
        else:
            self._emit(native.HIDDEN, in_=LAST_NORMED, flags=rows)
        return self._ops

    def _mixer(self, i: int, layer: Layer, order: str = "") -> None:
        """What a layer does with the tokens before one: attention, or a delta net."""
        p, eps, a = f"layers.{i}.", self._spec.norm_eps, layer.attention
        h = self._norm(p + "attn_norm", X, H, order=p + "qkv")
        self._adapted(p + "qkv", h, QKV)
        place = place_of(self._spec, i)
        if isinstance(layer.delta, Mamba):
            return state_space(self._emit, layer.delta, p, QKV, MIXED, place, order)
        if layer.delta is not None:
            v = p + "taps"
            v2 = p + "of_heads" if p + "of_heads" in self.ids else v
            return self._emit(native.DELTA, in_=QKV, out=MIXED, vector=v, vector2=v2, layer=place, f=eps, order=order)
        if a.latent is not None:
            return self._latent(p, a, a.latent, place, order)
        turns = native.LOCAL * a.local | native.STILL * (not a.rope) | native.WHOLE * a.qk_norm_whole
        turns |= native.LATE * a.qk_norm_late | native.NORM_VALUES * a.v_norm | native.QUERIES * (a.source is not None)
        self._emit(native.ROPE, in_=QKV, vector=p + "q_norm", vector2=p + "k_norm", layer=place, flags=turns, f=eps)
        last = "" if a.out_gate else order
        self._emit(
            native.ATTENTION, in_=QKV, out=buffers_of(self._spec, i).att, vector=p + "sinks", layer=place, f=a.scale,
            f2=a.soft_cap or 0, window=a.window or 0, order=last, flags=native.LOCAL * a.local,
        )  # fmt: skip
        if a.out_gate:
            gate = (a.heads + 2 * a.kv_heads) * a.head_dim
            self._emit(native.OUT_GATE, in_=QKV, out=ATT, layer=gate, order=order)

    def _latent(self, p: str, a: Attention, latent: LatentAttention, place: int, order: str) -> None:
        """Latent attention, from the products with x on."""
        if latent.q_rank:
            self._norm(p + "q_a_norm", QKV, Q_A, order=p + "q_b")
            self._emit(native.MATMUL, in_=Q_A, out=Q, weight=p + "q_b")
        column, norm = latent.q_rank or a.q_width, p + "kv_a_norm"
        self._emit(native.LATENT_KEY, in_=QKV, out=MET, vector=norm, layer=column, f=self._spec.inner_eps)
        self._emit(native.ABSORB, in_=Q if latent.q_rank else QKV, out=MET, weight=p + "k_b")
        self._emit(native.ROPE, in_=MET, layer=place)
        self._emit(native.ATTENTION, in_=MET, out=SUMS, layer=place, f=a.scale)
        self._emit(native.EXPAND, in_=SUMS, out=ATT, weight=p + "v_b", order=order)

    def _rest(self, i: int, layer: Layer, b: Buffers) -> None:
        """What a layer does behind its attention."""
        p, order = f"layers.{i}.", f"layers.{i}.gate_up"
        # with one norm it is taken once more: each product may want its own order
        norm, ahead = p + ("attn_norm" if layer.norms == "one" else "mlp_norm"), layer.norms in ("one", "beside")
        if ahead:  # of x as it still is
            h = self._norm(norm, b.x, b.h, flags=b.flags, order=order)
        self._add(p + "o", b.att, b, p + "attn_post_norm")
        if not layer.mlp.size:
            return
        if not ahead:
            h = self._norm(norm, b.x, b.h, flags=b.flags, order=order)
        scale = float(dequantize(self._tensors[p + "scale"])[0]) if layer.scaled else 0.0
        if layer.mlp.experts is not None and layer.mlp.experts.own_norms:
            kind, flags = ACTIVATIONS[layer.mlp.activation, True], EXPERT_FLAGS[layer.mlp.activation, True]
            return mixture_beside(p, self._spec.norm_eps, self._emit, kind, flags, scale)
        if layer.mlp.experts is not None:
            return self._mixture(p, layer.mlp, layer.mlp.experts)
        self._adapted(p + "gate_up", h, b.gate_up, b.flags)
        kind = ACTIVATIONS[layer.mlp.activation, layer.mlp.gated]
        self._emit(kind, in_=b.gate_up, out=b.mlp, flags=b.flags, order=p + "down")
        last = not self._spec.layer_embed
        self._add(p + "down", b.mlp, b, p + "mlp_post_norm", scale if last else 0.0)
        if not last:
            own_part(self._spec, i, b, self._emit, scale)

    def _add(self, weight: str, in_: int, b: Buffers, norm: str, scale: float = 0.0) -> None:
        """x += a product, normed where the layer has a norm behind it; times a scale then, if there is one."""
        if norm not in self.ids:
            return self._adapted(weight, in_, b.x, native.ADD | b.flags)
        self._adapted(weight, in_, b.h, b.flags)
        self._norm(norm, b.h, b.x, flags=native.ADD | b.flags, scale=scale)

    def _adapted(self, weight: str, in_: int, out: int, flags: int = 0) -> None:
        """A product that adapters may change."""
        self._emit(native.MATMUL, in_=in_, out=out, weight=weight, vector=weight + "_bias", flags=flags)
        if self._adapts:
            prefix, _, name = weight.rpartition(".")
            count = sum(f"{prefix}.{part}" in self._tensors for part in FUSED[name])
            self._emit(native.ADAPT, in_=in_, out=out, weight=weight, layer=count, flags=flags & native.LOGIT_ROWS)

    def _mixture(self, p: str, mlp: Mlp, experts: Experts) -> None:
        up, down, flags = p + "gate_up_experts", p + "down_experts", EXPERT_FLAGS[mlp.activation, mlp.gated]
        self._emit(native.MATMUL, in_=H, out=ROUTER, weight=p + "router", vector=p + "router_bias")
        self._emit(native.ROUTE, in_=ROUTER, vector=p + "router_choice_bias")
        self._emit(native.EXPERTS_UP, in_=H, out=CHOSEN, weight=up, vector=up + "_bias", flags=flags)
        self._emit(native.EXPERTS_DOWN, in_=CHOSEN, out=X, weight=down, vector=down + "_bias")
        if experts.shared:
            self._emit(native.MATMUL, in_=H, out=SHARED_GATE_UP, weight=p + "gate_up_shared")
            self._emit(native.SILU if mlp.gated else native.RELU2, in_=SHARED_GATE_UP, out=SHARED)
            if experts.shared_gate:
                self._emit(native.GATED, in_=H, out=SHARED, vector=p + "router_shared")
            self._emit(native.MATMUL, in_=SHARED, out=X, weight=p + "down_shared", flags=native.ADD)

    def _norm(self, name: str, in_: int, out: int, *, order: str = "", flags: int = 0, scale: float = 0.0) -> int:
        """The buffer that holds the normed rows: those of `in_` as they are where the model has no such norm."""
        if name not in self.ids:
            return in_
        kind = native.NORM if self._spec.norm == "rms" else native.LAYER_NORM
        bias, eps = name + "_bias", self._spec.inner_eps if name.endswith("_a_norm") else self._spec.norm_eps
        self._emit(kind, in_=in_, out=out, vector=name, vector2=bias, flags=flags, f=eps, f2=scale, order=order)
        return out

    def _emit(
        self, kind: int, *, in_: int = -1, out: int = -1, weight: str = "", vector: str = "", vector2: str = "",
        layer: int = 0, flags: int = 0, f: float = 0.0, f2: float = 0.0, window: int = 0, order: str = "",
    ) -> None:  # fmt: skip
        w, v, v2 = (self.ids.get(name, -1) for name in (weight, vector, vector2))
        self._ops.append(Op(kind, in_, out, w, v, v2, layer, flags, f, window, self._orders.get(order, 0), f2))


def _router(spec: ModelSpec) -> Router:
    e = mixture_of(spec)
    if e is None:
        return Router()
    return Router(e.count, e.active, e.normalized, e.sigmoid, e.groups, e.active_groups, e.group_best, e.scale)


def _inner(layer: Layer) -> Sequence[str]:
    """The slots of an MLP's first product."""
    return FUSED["gate_up"] if layer.mlp.gated else ("up",)


def _has_activation(mlp: Mlp) -> bool:
    return (mlp.activation, mlp.gated) in (EXPERT_FLAGS if mlp.experts else ACTIVATIONS)


def check_spec(spec: ModelSpec) -> None:
    """ModelError where the kernels lack something that the model needs."""
    first = spec.layers[0]
    check_delta(spec)
    check_kinds(spec)
    mixtures = {layer.mlp for layer in spec.layers if layer.mlp.experts is not None}
    if len(mixtures) > 1 or len(dense_sizes(spec)) > 2:
        raise ModelError("the CPU backend needs all layers of one shape", remedy="Try --device reference")
    if any(not _has_activation(layer.mlp) for layer in spec.layers):
        raise ModelError(f"the CPU backend has no activation {first.mlp.activation!r} here")
    if any((e := layer.mlp.experts) and not e.own_norms and layer.norms != "before" for layer in spec.layers):
        raise ModelError("the CPU backend has experts with no norm behind them only")
    if spec.norm == "layer" and first.norms in ("behind", "both"):
        raise ModelError("the CPU backend has no layer norms behind the halves of a layer")
    latent = first.attention.latent
    if latent is not None and (latent.rank % 16 or latent.value_dim % 16):
        raise ModelError(
            f"the CPU backend needs latent vectors and heads in multiples of 16, not {latent.rank} and "
            f"{latent.value_dim}",
            remedy="Try --device reference",
        )
