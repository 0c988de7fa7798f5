"""The gated delta net of a layer on tensors: what it means, in plain PyTorch; on a GPU the kernels do it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.delta import DeltaNet
from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.kernels import delta as kernels

States = tuple[Tensor, Tensor]
"""Of one layer, float32: the last inputs of each state's convolution [states, kernel - 1, channels], and S of its
value heads [states, value heads, key dim, value dim]."""
PRODUCTS = ("q", "k", "v", "z", "beta", "decay")
"""The slots whose products with a token stand side by side."""
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
        d, slots = self.shape, batch.slots.tolist()
        starts, contexts, out = batch.starts.tolist(), batch.contexts.tolist(), x.new_zeros(len(x), d.value_width)
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
                out[token] = self._advance(x[token].float(), past, s)
                if to >= 0 and place == end:
                    for part in states:
                        part[to] = part[slot]
        return out

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


def make_states(d: DeltaNet, count: int, device: torch.device) -> States:
    past = torch.zeros(count, d.kernel - 1, d.width, dtype=torch.float32, device=device)
    return past, torch.zeros(count, d.value_heads, d.key_dim, d.value_dim, dtype=torch.float32, device=device)
