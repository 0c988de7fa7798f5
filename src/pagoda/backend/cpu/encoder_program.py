"""From the spec of an encoder and its tensors to the native program: the same products, other operations between."""

from __future__ import annotations

from pagoda.arch.spec import Layer
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.buffers import ATT, LAST, LAST_NORMED, QKV, TOKENS, Buffers, H, X
from pagoda.backend.cpu.program import ACTIVATIONS, Program
from pagoda.backend.cpu.records import Op


class EncoderProgram(Program):
    """A program without a cache: each request is whole in one step."""

    def _weights(self) -> None:
        super()._weights()
        found = [name for name in ("types", "embed_norm", "embed_norm_bias") if name in self._tensors]
        self.ids |= {name: self._vector(name) for name in found}
        if "types" in found and self._tensors["types"].shape[0] == 1:
            self.ids["types"] = self._vector("types", "types")  # both texts of a pair take the one there is

    def _operations(self) -> list[Op]:
        encoder = self._spec.encoder
        first = encoder.first_position if encoder is not None else 0
        self._ops = []
        self._emit(native.EMBED, out=X, weight="embed", f=self._spec.embed_scale)
        if "positions" in self.ids or "types" in self.ids:
            self._emit(native.POSITIONS, out=X, vector="positions", vector2="types", layer=first)
        self._norm("embed_norm", X, X)
        for i, layer in enumerate(self._spec.layers):
            self._mixer(i, layer, f"layers.{i}.o")
            self._rest(i, layer, TOKENS)
        self._emit(native.GATHER, in_=X, out=LAST, flags=native.LOGIT_ROWS)
        last = self._norm("norm", LAST, LAST_NORMED, flags=native.LOGIT_ROWS)
        self._emit(native.HIDDEN, in_=last, flags=native.LOGIT_ROWS)
        return self._ops

    def _mixer(self, i: int, layer: Layer, order: str = "") -> None:
        p, a, eps = f"layers.{i}.", layer.attention, self._spec.norm_eps
        h = X if layer.norms == "sum" else self._norm(p + "attn_norm", X, H, order=p + "qkv")
        self._adapted(p + "qkv", h, QKV)
        if a.rope or a.qk_norm:
            turns = native.LOCAL * a.local | native.STILL * (not a.rope)
            self._emit(native.ROPE, in_=QKV, vector=p + "q_norm", vector2=p + "k_norm", flags=turns, f=eps)
        self._emit(native.ATTEND_ALL, in_=QKV, out=ATT, f=a.scale, window=a.window or 0, order=order)

    def _rest(self, i: int, layer: Layer, b: Buffers) -> None:
        if layer.norms != "sum":
            return super()._rest(i, layer, b)
        p = f"layers.{i}."
        self._adapted(p + "o", b.att, X, native.ADD)
        self._norm(p + "attn_norm", X, X)
        self._adapted(p + "gate_up", X, b.gate_up)
        self._emit(ACTIVATIONS[layer.mlp.activation, layer.mlp.gated], in_=b.gate_up, out=b.mlp, order=p + "down")
        self._adapted(p + "down", b.mlp, X, native.ADD)
        self._norm(p + "mlp_norm", X, X)
