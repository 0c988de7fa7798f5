"""How a model is pooled into vectors or scores, and the layers that it has behind that, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Projection:
    """A layer behind the pooling of an embedding model, of `width` outputs. `name`: its tensors in the checkpoint."""

    name: str
    width: int
    activation: Literal["none", "tanh"] = "none"
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the final hidden states of a request become one vector: that of the first token, of the last, or the mean.

    `labels` 0: that vector, through the `projections`, is the embedding. Else it gives scores: through `dense`, its
    activation and, with `dense_norm`, a norm where the model has it, then one row of weights for each label; or, with
    `tokens`, the difference of two rows of the decoder's own head (the logit of the second token over the first).
    With `answers` the one label has two rows, of yes and of no. `max_len`: the longest input it was trained for.
    """

    kind: Literal["cls", "mean", "last"]
    labels: int = 0
    dense: bool = False
    dense_bias: bool = True
    dense_norm: bool = False
    activation: str = "tanh"
    out_bias: bool = False
    tokens: tuple[int, int] | None = None
    answers: bool = False
    max_len: int | None = None
    projections: tuple[Projection, ...] = ()

    def slots(self, hidden: int, biased: bool) -> dict[str, tuple[int, ...]]:
        """The tensors of the layers behind the pooling, with their shapes. `biased`: norms are."""
        out: dict[str, tuple[int, ...]] = {}
        if self.dense:
            out |= {"pool_dense": (hidden, hidden)} | ({"pool_dense_bias": (hidden,)} if self.dense_bias else {})
        if self.dense_norm:
            out |= {"pool_norm": (hidden,)} | ({"pool_norm_bias": (hidden,)} if biased else {})
        if self.labels and self.tokens is None:
            out["score"] = (2 if self.answers else self.labels, hidden)
        if self.out_bias:
            out["score_bias"] = (self.labels,)
        for i, each in enumerate(self.projections):
            out[f"project.{i}"] = (each.width, hidden)
            if each.bias:
                out[f"project.{i}_bias"] = (each.width,)
            hidden = each.width
        return out
