"""One step on the device, and the shape of attention: what the operations and the kernels are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Seen = tuple[tuple[slice | Tensor, Tensor], ...]
"""Rows of a step, and the vectors of images [n, hidden size] that take the place of their embeddings."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """Tokens first:last of a step, of one request and from `position` on, each of which sees all of them."""

    first: int
    last: int
    request: int
    position: int


class OnHost(NamedTuple):
    """What of a batch the host knows, for kernels that are planned there."""

    starts: npt.NDArray[np.int32]  # [R + 1]
    contexts: npt.NDArray[np.int32]  # [R]
    tables: npt.NDArray[np.int32]  # [R, W]


class Prompts(Protocol):
    """Another kernel for the tokens of prompts, in one step."""

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads, sinks: Tensor | None, out: Tensor
    ) -> bool:
        """Writes what they get to `out`, and anything for single tokens; False where it does not do so."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One step on the device: R requests, T tokens, L rows of logits. Token arrays are in the order of the requests.

    Request r owns tokens starts[r]:starts[r + 1]. A padded batch (CUDA graphs) has tokens with the cell -1, which
    write nothing and whose results are not looked at, and requests without tokens.
    """

    tokens: Tensor  # int32 [T]
    positions: Tensor  # int32 [T], absolute
    cells: Tensor  # int64 [T], block * BLOCK_SIZE + offset of the token's place in the cache
    starts: Tensor  # int32 [R + 1]
    contexts: Tensor  # int32 [R], keys that the last token of the request sees: its position + 1
    block_tables: Tensor  # int32 [R, W]
    slots: Tensor  # int32 [R], where a request's state is, of models that keep one
    rows: Tensor  # int32 [L], the tokens whose logits are wanted
    max_query: int  # most tokens of one request; 1: all are decoding
    max_context: int  # largest of `contexts`, or a bound of it
    types: Tensor | None = None  # int32 [T], 1 from where the second text of a pair begins; for encoders
    rope_positions: Tensor | None = None  # int32 [3, T], where they are not `positions`
    seen: Seen = ()
    adapters: tuple[tuple[int, Tensor], ...] = ()  # places of adapters, and the tokens int64 [n] that each is for
    ahead: tuple[Ahead, ...] = ()  # tokens that see others behind them
    whole: bool = False  # `rows` are all tokens, in their order
    decoding: bool = False  # see upload.decoding
    kept: Tensor | None = None  # int32 [R, 3], see StepPlan; None: no state is copied
    on_host: OnHost | None = None
    prompts: Prompts | None = None  # None: the own kernel
    runs: Tensor | None = None  # what `prepared` adds for the kernels


@dataclass(frozen=True, slots=True)
class Routed:
    """Which experts the T tokens of a step go to, A for each. Their rows are sorted by expert, then by token."""

    shares: Tensor  # float32 [T, A]
    starts: Tensor  # int32 [experts + 1]: expert e has the rows starts[e]:starts[e + 1]
    tokens: Tensor  # int32 [T * A], of each row
    owners: Tensor  # int32 [T * A], the expert of each row
    places: Tensor  # int32 [T, A], the rows of each token


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of attention in one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    eps: float  # of the norms of q and k
    interleaved: bool  # RoPE turns the pairs (2i, 2i + 1), else (i, i + dim / 2)
    rope: bool = True  # False: nothing is turned
    local: bool = False  # turned by the second table of angles
    soft_cap: float | None = None  # scores s become soft_cap * tanh(s / soft_cap)
    late: bool = False  # the norms of q and k come behind the rotation
    turned: int = 0  # of latent attention: values of a key in front of those that are the value too
    v_norm: bool = False  # each head of v is normed, without weights
    keeps: bool = True  # False: keys and values are those of another layer
