"""The layers with a state, delta nets, short convolutions, state spaces: plain PyTorch; on a GPU the kernels do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.delta import DeltaNet
from pagoda.arch.mamba import Mamba
from pagoda.arch.recurrence import Recurrence
from pagoda.arch.short_conv import ShortConv
from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.kernels import delta as kernels
from pagoda.backend.torch.kernels import mamba, short_conv

States = tuple[Tensor, Tensor]
"""Of one layer, float32: the last inputs of each state's convolution [states, kernel - 1, channels], and S of its
value heads [states, value heads, key dim, value dim]."""
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Delta:
    """What the layer has beside its products; all in float32."""

    shape: DeltaNet
    taps: Tensor  # [kernel, channels]
    rate: Tensor  # [value heads]
    dt: Tensor  # [value heads]
    norm: Tensor  # [value dim]
    eps: float

    def __call__(self, x: Tensor, states: States, batch: Batch) -> Tensor:
        """[T, value heads * value dim] of products x [T, q, k, v, z, beta, decay], in x's type; moves the states."""
        if ops.on_gpu(x):
            return kernels.delta(x, self.shape, (self.taps, self.rate, self.dt, self.norm), self.eps, states, batch)
        return _walked(x, x.new_zeros(len(x), self.shape.value_width), self._advance, states, batch)

    def _advance(self, x: Tensor, past: Tensor, s: Tensor) -> Tensor:
        """One token."""
        d = self.shape
        mixed, z, beta, decay = torch.split(x, [d.width, d.value_width, d.value_heads, d.value_heads])
        inputs = torch.cat((past, mixed[None]))
        past.copy_(inputs[1:])
        q, k, v = torch.split(F.silu((inputs * self.taps).sum(0)), [d.key_width, d.key_width, d.value_width])
        q, k = (self._of_value_heads(part) for part in (q, k))
        s *= torch.exp(-self.rate * F.softplus(decay + self.dt))[:, None, None]
        v = torch.unflatten(v, 0, (d.value_heads, -1))
        change = torch.sigmoid(beta)[:, None] * (v - (s * k[:, :, None]).sum(1))
        s += k[:, :, None] * change[:, None]
        y = (s * q[:, :, None]).sum(1) * d.key_dim**-0.5
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.norm
        out: Tensor = y.flatten() * F.silu(z)
        return out

    def _of_value_heads(self, x: Tensor) -> Tensor:
        d = self.shape
        heads: Tensor = torch.unflatten(x, 0, (d.key_heads, d.key_dim))
        heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + _EPS)
        shared = d.value_heads // d.key_heads
        return heads.repeat(shared, 1) if d.tiled else heads.repeat_interleave(shared, 0)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A short convolution."""

    shape: ShortConv
    taps: Tensor  # float32 [kernel, channels]

    def __call__(self, x: Tensor, states: States, batch: Batch) -> Tensor:
        """[T, channels] of products x [T, b, u, c], in x's type; moves the states."""
        if ops.on_gpu(x):
            return short_conv.convolved(x, self.shape, self.taps, states[0], batch)
        return _walked(x, x.new_zeros(len(x), self.shape.channels), self._advance, states, batch)

    def _advance(self, x: Tensor, past: Tensor, _: Tensor) -> Tensor:
        """One token."""
        b, u, c = x.chunk(3)
        inputs = torch.cat((past, (b * u)[None]))
        past.copy_(inputs[1:])
        return (inputs * self.taps).sum(0) * c


@dataclass(frozen=True, slots=True)
class StateSpace:
    """What a state space has beside its products; all in float32."""

    shape: Mamba
    taps: Tensor  # [kernel, channels]
    bias: Tensor  # [channels]
    rate: Tensor  # [value heads]
    dt: Tensor  # [value heads]
    skip: Tensor  # [value heads]
    norm: Tensor  # [value heads * value dim]

    def __call__(self, x: Tensor, states: States, batch: Batch) -> Tensor:
        """[T, value heads * value dim] of products x [T, q, k, v, z, decay], in x's type; moves the states."""
        if ops.on_gpu(x):
            weights = (self.taps, self.bias, self.rate, self.dt, self.skip, self.norm)
            return mamba.state_space(x, self.shape, weights, states, batch)
        return _walked(x, x.new_zeros(len(x), self.shape.value_width), self._advance, states, batch)

    def _advance(self, x: Tensor, past: Tensor, s: Tensor) -> Tensor:
        """One token."""
        d = self.shape
        mixed, z, decay = torch.split(x, [d.width, d.value_width, d.value_heads])
        inputs = torch.cat((past, mixed[None]))
        past.copy_(inputs[1:])
        convolved = F.silu((inputs * self.taps).sum(0) + self.bias)
        q, k, v = torch.split(convolved, [d.key_width, d.key_width, d.value_width])
        q, k = (self._of_heads(part) for part in (q, k))
        v, step = torch.unflatten(v, 0, (d.value_heads, -1)), F.softplus(decay + self.dt)[:, None]
        s *= torch.exp(-self.rate[:, None] * step)[:, None]
        s += k[:, :, None] * (step * v)[:, None]
        y = (s * q[:, :, None]).sum(1) + self.skip[:, None] * v
        gated = torch.unflatten(y.flatten() * F.silu(z), 0, (d.groups, -1))
        out: Tensor = (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + d.eps)).flatten() * self.norm
        return out

    def _of_heads(self, x: Tensor) -> Tensor:
        d = self.shape
        return torch.unflatten(x, 0, (d.groups, d.key_dim)).repeat_interleave(d.value_heads // d.groups, 0)


def _walked(
    x: Tensor, out: Tensor, advance: Callable[[Tensor, Tensor, Tensor], Tensor], states: States, batch: Batch
) -> Tensor:
    """What `advance` makes of each token, in order, and of the two parts of its request's state."""
    slots, starts, contexts = batch.slots.tolist(), batch.starts.tolist(), batch.contexts.tolist()
    kept = [[-1, -1, -1]] * len(slots) if batch.kept is None else batch.kept.tolist()
    for r, slot in enumerate(slots):
        past, s = states[0][slot], states[1][slot]
        position = contexts[r] - (starts[r + 1] - starts[r])
        begin, to, end = kept[r]
        for part in states:
            if begin >= 0:
                part[slot] = part[begin]
            elif position == 0:
                part[slot] = 0
        for place, token in enumerate(range(starts[r], starts[r + 1]), position + 1):
            out[token] = advance(x[token].float(), past, s)
            if to >= 0 and place == end:
                for part in states:
                    part[to] = part[slot]
    return out


def make_states(d: Recurrence, count: int, device: torch.device) -> States:
    past = torch.zeros(count, d.kernel - 1, d.width, dtype=torch.float32, device=device)
    return past, torch.zeros(count, *d.state_shape, dtype=torch.float32, device=device)
