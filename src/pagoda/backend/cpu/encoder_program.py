"""From the spec of an encoder and its tensors to the native program: the same products, other operations between."""

from __future__ import annotations

from pagoda.arch.spec import Layer
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.buffers import ATT, GATE_UP, LAST, MLP, QKV, X
from pagoda.backend.cpu.program import ACTIVATIONS, Program
from pagoda.backend.cpu.records import Op


class EncoderProgram(Program):
    """A program without a cache: each request is whole in one step."""

    def _weights(self) -> None:
        self.ids = {"embed": self._matrix("embed")}
        for name in ("positions", "norm", "norm_bias"):
            self.ids[name] = self._vector(name)
        one = self._tensors["types"].shape[0] == 1  # that both texts of a pair take
        self.ids["types"] = self._vector("types", "types") if one else self._vector("types")
        for i in range(len(self._spec.layers)):
            p = f"layers.{i}."
            self.ids[p + "qkv"] = self._matrix(*(p + s for s in "qkv"))
            self.ids[p + "qkv_bias"] = self._vector(*(p + s + "_bias" for s in "qkv"))
            for name in ("o", "up", "down"):
                self.ids[p + name] = self._matrix(p + name)
                self.ids[p + name + "_bias"] = self._vector(p + name + "_bias")
            for name in ("attn_norm", "attn_norm_bias", "mlp_norm", "mlp_norm_bias"):
                self.ids[p + name] = self._vector(p + name)
            self._progress("weights", (i + 1) / len(self._spec.layers))

    def _operations(self) -> list[Op]:
        encoder = self._spec.encoder
        first = encoder.first_position if encoder is not None else 0
        self._ops = []
        self._emit(native.EMBED, out=X, weight="embed")
        self._emit(native.POSITIONS, out=X, vector="positions", vector2="types", layer=first)
        self._norm("norm", X, X)
        for i, layer in enumerate(self._spec.layers):
            self._layer(i, layer)
        self._emit(native.GATHER, in_=X, out=LAST, flags=native.LOGIT_ROWS)
        self._emit(native.HIDDEN, in_=LAST, flags=native.LOGIT_ROWS)
        return self._ops

    def _layer(self, i: int, layer: Layer) -> None:
        p = f"layers.{i}."
        self._emit(native.MATMUL, in_=X, out=QKV, weight=p + "qkv", vector=p + "qkv_bias")
        self._emit(native.ATTEND_ALL, in_=QKV, out=ATT, f=layer.attention.scale)
        self._emit(native.MATMUL, in_=ATT, out=X, weight=p + "o", vector=p + "o_bias", flags=native.ADD)
        self._norm(p + "attn_norm", X, X)
        self._emit(native.MATMUL, in_=X, out=GATE_UP, weight=p + "up", vector=p + "up_bias")
        self._emit(ACTIVATIONS[layer.mlp.activation, layer.mlp.gated], in_=GATE_UP, out=MLP)
        self._emit(native.MATMUL, in_=MLP, out=X, weight=p + "down", vector=p + "down_bias", flags=native.ADD)
        self._norm(p + "mlp_norm", X, X)
