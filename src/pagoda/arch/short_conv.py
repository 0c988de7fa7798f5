"""Short convolution: a layer that mixes each token with the few before it, and keeps these for a request."""

from __future__ import annotations

from typing import ClassVar

import msgspec
from msgspec.structs import replace

FLOAT32_BYTES = 4


class ShortConv(msgspec.Struct, frozen=True, tag="short_conv"):
    """A gated convolution in place of an attention (LFM2, arXiv 2511.23404): o(c(x) * conv(b(x) * u(x))).

    The convolution is causal, each channel by itself over `kernel` tokens, zeros before a request's first.
    """

    PRODUCTS: ClassVar[tuple[str, ...]] = ("b", "u", "c")
    """The slots whose products with a token stand side by side."""

    channels: int
    kernel: int

    @property
    def width(self) -> int:
        """Channels of the convolution."""
        return self.channels

    @property
    def value_width(self) -> int:
        """Inputs of o."""
        return self.channels

    @property
    def value_heads(self) -> int:
        return 0

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return 0, 0, 0

    @property
    def state_bytes(self) -> int:
        """What a request keeps from token to token: inputs of the convolution; float32."""
        return FLOAT32_BYTES * (self.kernel - 1) * self.channels

    def slots(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """The tensors of such a layer in place of those of an attention."""
        n = self.channels
        out: dict[str, tuple[int, ...]] = dict.fromkeys(("b", "u", "c"), (n, hidden))
        return out | {"u_conv": (n, self.kernel), "o": (hidden, n)}

    def cut_width(self, slot: str) -> int:
        """Places of a tensor that lie channel by channel; 0 for other tensors."""
        return self.channels if slot in ("b", "u", "c", "u_conv", "o") else 0

    def divides(self, size: int, group: int) -> bool:
        """Whether several GPUs can share it."""
        return self.channels // group % size == 0

    def share(self, size: int) -> ShortConv:
        """What one of several GPUs has."""
        return replace(self, channels=self.channels // size)
