"""Sampling on the device: the tokens of backend/sampling.py, all rows of logits at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_TOKEN = -1
NEAREST = 256
"""A top-k of so many tokens at most is found without sorting all of them."""
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Ragged:
    """Values of some tokens of some rows: entry i belongs to token ids[i] of row rows[i]."""

    rows: Tensor  # int64 [P]
    ids: Tensor  # int64 [P]
    values: Tensor  # float32 [P]: counts of a history, or biases


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the token of each of L rows of logits. What no row needs is None or False: its work is left out."""

    temperature: Tensor  # float32 [L], 0 is greedy
    top_k: Tensor  # int64 [L], 0 is all
    top_p: Tensor  # float32 [L]
    min_p: Tensor  # float32 [L]
    seed: Tensor  # int64 [L], the 64 bits of the seed
    position: Tensor  # int64 [L], of the sampled token
    presence: Tensor  # float32 [L]
    frequency: Tensor  # float32 [L]
    repetition: Tensor  # float32 [L]
    history: Ragged | None  # each token once per row; counts in the output, 0: only in the prompt
    bias: Ragged | None  # a token may come twice
    mask: tuple[Tensor, Tensor] | None  # rows int64 [M]; words int32 [M, ceil(vocab / 32)], bit set: allowed
    random: bool  # any temperature above 0
    near: bool  # any top-k of at most NEAREST
    sorted: bool  # any other top-k
    nucleus: bool = False  # any top-p without a top-k

    @property
    def raw(self) -> bool:
        """The logits count as they are."""
        return self.history is None and self.bias is None and self.mask is None

    @property
    def plain(self) -> bool:
        """The largest logit of each row is the answer."""
        return not self.random and self.raw


def philox(seed: Tensor, position: Tensor) -> Tensor:
    """float64 [L] in [0, 1): the first word of Philox4x32-10 keyed by seed with the counter position, by 2^-24."""
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    c0, c1 = position & _WORD, torch.zeros_like(position)
    c2, c3 = torch.zeros_like(position), torch.zeros_like(position)
    for _ in range(10):
        a_high, a_low = _product(0xD2511F53, c0)
        b_high, b_low = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return (c0 >> 8).double() * 2.0**-24


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of two 32-bit numbers, which int64 itself cannot hold unsigned."""
    low = factor * (x & 0xFFFF)
    high = factor * (x >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def sample(logits: Tensor, how: Sampling) -> Tensor:
    """int64 [L]: the token of each row of raw logits float32 [L, vocab]; NO_TOKEN where none is possible."""
    values = adjusted(logits, how)
    top = values.amax(-1)
    tokens = values.argmax(-1)
    if how.random:
        tokens = torch.where(how.temperature == 0, tokens, _drawn(values, how))
    return torch.where(top.isfinite() & logits.amax(-1).isfinite(), tokens, NO_TOKEN)


def adjusted(logits: Tensor, how: Sampling) -> Tensor:
    """The logits after penalties, biases and masks; the same float32 operations as in backend/sampling.py."""
    if how.raw:
        return logits
    out = logits.clone()
    if how.history is not None:
        rows, ids, counts = how.history.rows, how.history.ids, how.history.values
        seen, repetition = out[rows, ids], how.repetition[rows]
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        seen = seen - how.frequency[rows] * counts
        out[rows, ids] = torch.where(counts > 0, seen - how.presence[rows], seen)
    if how.bias is not None:
        out.index_put_((how.bias.rows, how.bias.ids), how.bias.values, accumulate=True)
    if how.mask is not None:
        rows, words = how.mask
        bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
        allowed = bits.flatten(1)[:, : out.shape[1]].bool()
        out[rows] = out[rows].masked_fill(~allowed, float("-inf"))
    return out


def _drawn(values: Tensor, how: Sampling) -> Tensor:
    """The first id, in ascending order, whose cumulative weight exceeds the row's draw; float64 throughout."""
    exact = values.double()
    weights = torch.exp((exact - exact.amax(-1, keepdim=True)) / _heat(how))
    if how.near or how.sorted or how.nucleus:
        weights = _shortened(values, weights, how)
    likely = weights >= how.min_p.double().unsqueeze(-1) * weights.amax(-1, keepdim=True)
    cumulative = torch.where(likely, weights, 0.0).cumsum(-1)
    target = philox(how.seed, how.position).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_max(values.shape[1] - 1)


def _shortened(values: Tensor, weights: Tensor, how: Sampling) -> Tensor:
    """The weights with 0 for what top-k and top-p leave out."""
    keys = ranks(values)
    return torch.where(keys >= cuts(values, keys, how).unsqueeze(-1), weights, 0.0)


def cuts(values: Tensor, keys: Tensor, how: Sampling) -> Tensor:
    """int64 [L]: of the keys (see `ranks`) of each row the least that top-k and top-p keep. Ties go by lower id.

    Which way a row goes follows from its own parameters, so its sums do not depend on the others.
    """
    is_near = (how.top_k > 0) & (how.top_k <= NEAREST)
    far = ~is_near & ((how.top_k > 0) | (how.top_p < 1))
    out = torch.full_like(keys[:, 0], torch.iinfo(torch.int64).min)
    if how.near:  # what is further back than a top-k weighs nothing
        best = keys.topk(min(NEAREST, values.shape[1]), dim=-1).values
        out = torch.where(is_near, _least(best, values, how), out)
    if how.sorted or how.nucleus:
        best = torch.sort(keys, dim=-1, descending=True).values
        out = torch.where(far, _least(best, values, how), out)
    return out


def _least(best: Tensor, values: Tensor, how: Sampling) -> Tensor:
    """The last of the keys [L, n], the likeliest first, that top-k and top-p keep."""
    exact = values.gather(-1, _WORD - (best & _WORD)).double()
    ordered = torch.exp((exact - exact[:, :1]) / _heat(how))
    place = torch.arange(best.shape[1], device=best.device)
    k = torch.where(how.top_k > 0, how.top_k, best.shape[1]).clamp_max(best.shape[1]).unsqueeze(-1)
    cumulative = torch.where(place < k, ordered, 0.0).cumsum(-1)
    target = how.top_p.double().unsqueeze(-1) * cumulative[:, -1:]
    count = torch.minimum(torch.searchsorted(cumulative, target) + 1, k)
    return best.gather(-1, torch.where(how.top_p.unsqueeze(-1) >= 1, k, count) - 1).squeeze(-1)


def _heat(how: Sampling) -> Tensor:
    return how.temperature.double().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)


def ranks(values: Tensor) -> Tensor:
    """int64 keys that order float32 values, larger first, ties by lower id when taken in descending order."""
    bits = values.view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = torch.where(values == 0, 0, ordered)  # -0.0 and 0.0 are one value
    ids = torch.arange(values.shape[-1], device=values.device)
    return (ordered << 32) + (_WORD - ids)


def log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), dim=-1).float()


def top_logprobs(logits: Tensor, logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row: ids int64 and log-probabilities [L, count], ties by lower id."""
    ids = ranks(logits).topk(count, dim=-1).indices
    return ids, logprobs.gather(-1, ids)
