"""What the layers with a state keep of a request, and what one token does to it, in plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pagoda.arch.delta import DeltaNet
from pagoda.arch.mamba import Mamba
from pagoda.arch.recurrence import Recurrence
from pagoda.types import Float32, StepPlan

WEIGHTS = ("q_conv", "k_conv", "v_conv", "rate", "dt")
_EPS = np.float32(1e-6)


@dataclass(frozen=True, slots=True)
class State:
    past: Float32  # [kernel - 1, width] the last inputs of the convolution
    s: Float32  # [value heads, key dim, value dim]

    def clear(self) -> None:
        self.past[:] = 0
        self.s[:] = 0

    def copy(self, other: State) -> None:
        self.past[:] = other.past
        self.s[:] = other.s

    def convolved(self, now: Float32, taps: Float32) -> Float32:
        """The convolution of what came before and a token's own [width]."""
        inputs = np.concatenate((self.past, now[None]))
        self.past[:] = inputs[1:]
        return np.asarray((inputs * taps).sum(axis=0))

    def advance(self, d: DeltaNet, mixed: Float32, taps: Float32, decay: Float32, share: Float32) -> Float32:
        """The output [value heads, value dim] of a token with q, k and v `mixed` [width], before its norm."""
        x = self.convolved(mixed, taps)
        x = x / (1 + np.exp(-x))
        q, k, v = np.split(x, (d.key_width, 2 * d.key_width))
        q, k = (_of_value_heads(d, _unit(part.reshape(d.key_heads, d.key_dim))) for part in (q, k))
        self.s[:] *= decay[:, None, None]
        delta = share[:, None] * (v.reshape(d.value_heads, d.value_dim) - np.einsum("hkv,hk->hv", self.s, k))
        self.s[:] += k[:, :, None] * delta[:, None]
        return np.asarray(np.einsum("hkv,hk->hv", self.s, q) * np.float32(d.key_dim**-0.5))

    def scan(self, d: Mamba, mixed: Float32, own: Mapping[str, Float32], decay: Float32) -> Float32:
        """The output [value heads, value dim] of a token of a state space, before its gate and norm."""
        x = self.convolved(mixed, own["taps"]) + own["bias"]
        x = x / (1 + np.exp(-x))
        q, k, v = np.split(x, (d.key_width, 2 * d.key_width))
        q, k = (np.repeat(part.reshape(d.groups, d.key_dim), d.value_heads // d.groups, axis=0) for part in (q, k))
        v, step = v.reshape(d.value_heads, d.value_dim), np.logaddexp(np.float32(0), decay + own["dt"])
        self.s[:] *= np.exp(-own["rate"] * step)[:, None, None]
        self.s[:] += k[:, :, None] * (step[:, None] * v)[:, None]
        return np.asarray(np.einsum("hkv,hk->hv", self.s, q) + own["skip"][:, None] * v)


def advance(
    d: DeltaNet, products: Mapping[str, Float32], own: Mapping[str, Float32], states: Sequence[State], plan: StepPlan
) -> Float32:
    """[T, value heads, value dim], before its norm, of the products with the tokens of a plan, in their order."""
    mixed = np.concatenate([products[letter] for letter in "qkv"], axis=1)
    taps = np.concatenate([own[f"{letter}_conv"] for letter in "qkv"]).T
    decay = np.exp(-own["rate"] * np.logaddexp(np.float32(0), products["decay"] + own["dt"]))
    share = 1 / (1 + np.exp(-products["beta"]))
    out = np.empty((len(mixed), d.value_heads, d.value_dim), np.float32)

    def one(state: State, token: int) -> Float32:
        return state.advance(d, mixed[token], taps, decay[token], share[token])

    return _walked(out, one, states, plan)


def convolve(products: Mapping[str, Float32], taps: Float32, states: Sequence[State], plan: StepPlan) -> Float32:
    """[T, channels] of a short convolution's products with the tokens of a plan, in their order."""
    inputs = products["b"] * products["u"]
    out = _walked(np.empty_like(inputs), lambda state, token: state.convolved(inputs[token], taps.T), states, plan)
    return np.asarray(out * products["c"])


def scan(
    d: Mamba, products: Mapping[str, Float32], own: Mapping[str, Float32], states: Sequence[State], plan: StepPlan
) -> Float32:
    """[T, value width] of a state space, behind its gate and norm, of the products with the tokens of a plan."""
    mixed = np.concatenate([products[letter] for letter in "qkv"], axis=1)
    small = {**own, "taps": np.concatenate([own[f"{letter}_conv"] for letter in "qkv"]).T}
    small["bias"] = np.zeros(d.width, np.float32)
    if d.conv_bias:
        small["bias"] = np.concatenate([own[f"{letter}_conv_bias"] for letter in "qkv"])

    def one(state: State, token: int) -> Float32:
        return state.scan(d, mixed[token], small, products["decay"][token])

    out = _walked(np.empty((len(mixed), d.value_heads, d.value_dim), np.float32), one, states, plan)
    z = products["z"]
    gated = (out.reshape(len(z), -1) * z / (1 + np.exp(-z))).reshape(len(z), d.groups, -1)
    normed = gated / np.sqrt(np.square(gated).mean(axis=-1, keepdims=True) + np.float32(d.eps))
    return np.asarray(normed.reshape(len(z), -1) * own["z_norm"])


def _walked(out: Float32, one: Callable[[State, int], Float32], states: Sequence[State], plan: StepPlan) -> Float32:
    """What `one` makes of each token, in order, and of the state of its request."""
    for r, slot in enumerate(plan.slots):
        state, position = states[slot], plan.positions[r]
        begin, to, end = (-1, -1, -1) if plan.kept is None else plan.kept[r]
        if begin >= 0:
            state.copy(states[begin])
        elif position == 0:
            state.clear()
        for place, token in enumerate(range(plan.starts[r], plan.starts[r + 1]), position + 1):
            out[token] = one(state, token)
            if to >= 0 and place == end:
                states[to].copy(state)
    return out


def new_states(d: Recurrence, count: int) -> list[State]:
    past = (d.kernel - 1, d.width)
    return [State(np.zeros(past, np.float32), np.zeros(d.state_shape, np.float32)) for _ in range(count)]


def _unit(x: Float32) -> Float32:
    return np.asarray(x / np.sqrt(np.square(x).sum(axis=-1, keepdims=True) + _EPS))


def _of_value_heads(d: DeltaNet, x: Float32) -> Float32:
    shared = d.value_heads // d.key_heads
    return np.tile(x, (shared, 1)) if d.tiled else np.repeat(x, shared, axis=0)
