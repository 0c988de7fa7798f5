"""A state of one matrix for each head, behind a convolution: what a delta net and a state space have in common."""

from __future__ import annotations

import msgspec

FLOAT32_BYTES = 4


class MatrixState(msgspec.Struct, frozen=True):
    """Heads of q and k, shared by heads of v; each of these has a state [key_dim, value_dim]. The convolution goes over
    `kernel` tokens."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def width(self) -> int:
        """Channels of the convolution: q, k and v side by side."""
        return 2 * self.key_width + self.value_width

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.value_heads, self.key_dim, self.value_dim

    @property
    def state_bytes(self) -> int:
        """What a request keeps from token to token: inputs of the convolution, and the states; float32."""
        state = self.value_heads * self.key_dim * self.value_dim
        return FLOAT32_BYTES * ((self.kernel - 1) * self.width + state)
