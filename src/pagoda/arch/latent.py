"""Latent attention: the keys and values of all heads are made from one short vector, which alone is kept of a token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latent:
    """What a layer's attention has with it (DeepSeek-V2, arXiv 2405.04434, 2.1).

    Of a token the vector (r, c) is kept: c is kv_a_norm of the first `rank` values of kv_a(x), and r the rest of them,
    turned. The queries of a head are `nope` values, and behind them as many as r has, which are turned too; they are
    q(x), or with a `q_rank` q_b(q_a_norm(q_a(x))), where q_a gives so many values. With the matrices k_b and v_b of its
    own a head would have the key (k_b^T c, r) and the value v_b c, of `value_dim`. Its scores are those of
    (turned q, k_b q) with what is kept, and its sum of values is v_b of the sum of c: so all heads attend to one key
    (r, c), whose value is its c, and no other is made.
    """

    rank: int
    nope: int
    value_dim: int
    q_rank: int = 0

    def slots(self, hidden: int, heads: int, turned: int) -> dict[str, tuple[int, ...]]:
        """The tensors of such a layer in place of those of q, k, v and o."""
        q = heads * (self.nope + turned)
        out: dict[str, tuple[int, ...]] = {"q": (q, hidden)}
        if self.q_rank:
            out = {"q_a": (self.q_rank, hidden), "q_a_norm": (self.q_rank,), "q_b": (q, self.q_rank)}
        out |= {"kv_a": (self.rank + turned, hidden), "kv_a_norm": (self.rank,)}
        out |= {"k_b": (heads, self.rank, self.nope), "v_b": (heads, self.value_dim, self.rank)}
        return out | {"o": (hidden, heads * self.value_dim)}
