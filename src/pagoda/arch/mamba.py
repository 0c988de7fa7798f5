"""State space layer (Mamba-2): a state of constant size for a request in place of keys and values."""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from pagoda.arch.matrix_state import MatrixState


class Mamba(MatrixState, frozen=True, tag="mamba"):
    """A layer's state space (Mamba-2, arXiv 2405.21060), in the words of linear attention: C is q, B is k, x is v.

    q, k and v go through a causal convolution over `kernel` tokens, each channel by itself, and silu. A head holds a
    state S [key_dim, value_dim], zero at the start of a request, and shares q and k with the other heads of its group;
    each token does, with step = softplus(decay(x) + dt), one after the other:

        S = exp(-rate * step) * S + k (step * v)^T
        out = S^T q + skip * v

    and the layer gives o(rms norm(out * silu(z(x)))), where each group has a norm of its own; its epsilon is `eps`.
    """

    PRODUCTS: ClassVar[tuple[str, ...]] = ("q", "k", "v", "z", "decay")
    """The slots whose products with a token stand side by side."""

    eps: float
    conv_bias: bool = True

    @property
    def groups(self) -> int:
        """Of heads that share q and k, each with a norm of its own."""
        return self.key_heads

    def slots(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """The tensors of such a layer in place of those of an attention."""
        k, v, heads = self.key_width, self.value_width, self.value_heads
        products = {"q": k, "k": k, "v": v, "z": v, "decay": heads}
        out: dict[str, tuple[int, ...]] = {name: (rows, hidden) for name, rows in products.items()}
        for name, channels in (("q_conv", k), ("k_conv", k), ("v_conv", v)):
            out[name] = (channels, self.kernel)
            if self.conv_bias:
                out[f"{name}_bias"] = (channels,)
        return out | dict.fromkeys(("rate", "dt", "skip"), (heads,)) | {"z_norm": (v,), "o": (hidden, v)}

    def cut_width(self, slot: str) -> int:
        """Places of a tensor that lie head by head; 0 for other tensors."""
        if slot.removesuffix("_bias") in ("q", "k", "q_conv", "k_conv"):
            return self.key_width
        if slot.removesuffix("_bias") in ("v", "z", "v_conv", "o", "z_norm"):
            return self.value_width
        return self.value_heads if slot in ("decay", "rate", "dt", "skip") else 0

    def divides(self, size: int, group: int) -> bool:
        """Each GPU takes some groups with their heads."""
        return self.groups % size == 0 and self.value_width // group % size == 0

    def share(self, size: int) -> Mamba:
        """What one of several GPUs has."""
        return replace(self, key_heads=self.key_heads // size, value_heads=self.value_heads // size)
