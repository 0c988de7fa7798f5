"""Gated delta net: linear attention, which keeps a state of constant size for a request in place of keys and values."""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from pagoda.arch.matrix_state import MatrixState


class DeltaNet(MatrixState, frozen=True, tag="delta_net"):
    """A layer's linear attention (Gated DeltaNet, arXiv 2412.06464).

    q, k and v go through a causal convolution over `kernel` tokens, each channel by itself, and silu; then q and k of
    each head have length 1. A value head holds a state S [key_dim, value_dim], zero at the start of a request; each
    token does, one after the other:

        S = exp(-rate * softplus(decay(x) + dt)) * S
        S = S + k (sigmoid(beta(x)) * (v - S^T k))^T
        out = S^T q / sqrt(key_dim)

    and the layer gives o(rms norm(out) * silu(z(x))). Value heads share key heads in runs, or, `tiled`, in turns.
    """

    PRODUCTS: ClassVar[tuple[str, ...]] = ("q", "k", "v", "z", "beta", "decay")
    """The slots whose products with a token stand side by side."""

    tiled: bool = False

    def slots(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """The tensors of such a layer in place of those of an attention."""
        k, v, heads = self.key_width, self.value_width, (self.value_heads,)
        products = {"q": k, "k": k, "v": v, "z": v, "beta": self.value_heads, "decay": self.value_heads}
        out: dict[str, tuple[int, ...]] = {name: (rows, hidden) for name, rows in products.items()}
        out |= {"q_conv": (k, self.kernel), "k_conv": (k, self.kernel), "v_conv": (v, self.kernel)}
        return out | {"rate": heads, "dt": heads, "z_norm": (self.value_dim,), "o": (hidden, v)}

    def cut_width(self, slot: str) -> int:
        """Places of a tensor that lie head by head; 0 for other tensors."""
        if slot in ("q", "k", "q_conv", "k_conv"):
            return self.key_width
        if slot in ("v", "z", "v_conv", "o"):
            return self.value_width
        return self.value_heads if slot in ("beta", "decay", "rate", "dt") else 0

    def divides(self, size: int, group: int) -> bool:
        """Each GPU takes some key heads, and the value heads that share them; tiled, these do not lie together."""
        together = size == 1 or not self.tiled or self.key_heads == self.value_heads
        return together and self.key_heads % size == 0 and self.value_width // group % size == 0

    def share(self, size: int) -> DeltaNet:
        """What one of several GPUs has."""
        return replace(self, key_heads=self.key_heads // size, value_heads=self.value_heads // size)
