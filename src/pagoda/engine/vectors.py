"""From what a pooled model gives for a request, float32 bytes, to vectors and probabilities."""

from __future__ import annotations

import math

import numpy as np

from pagoda.errors import BadRequest
from pagoda.types import Float32


def vector(raw: bytes, normalize: bool, dimensions: int | None = None) -> Float32:
    """An embedding: cut, then of length 1 if that is wanted."""
    values = np.frombuffer(raw, np.float32)[:dimensions]
    if not normalize:
        return values
    return np.asarray(values / np.float32(max(math.sqrt(float(values @ values)), 1e-12)), np.float32)


def probability(raw: bytes) -> float:
    """A scoring model's logit as a number from 0 to 1."""
    logit = float(np.frombuffer(raw, np.float32)[0])
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def probabilities(raw: bytes) -> list[float]:
    """One for each label of a classifier; where there is a single label, it holds or not."""
    logits = np.frombuffer(raw, np.float32).astype(np.float64)
    if logits.size == 1:
        return [probability(raw)]
    weights = np.exp(logits - logits.max())
    return [float(each) for each in weights / weights.sum()]


def classes(raw: bytes, use_activation: bool | None = None) -> list[float]:
    """A number for each label: its probability, or with `use_activation` False what the model gives."""
    return [float(each) for each in np.frombuffer(raw, np.float32)] if use_activation is False else probabilities(raw)


def check_dimensions(dimensions: int | None, width: int, allowed: tuple[int, ...] | None) -> None:
    """Raise BadRequest for a length that vectors of this model cannot be cut to; () allows all, None no other."""
    if dimensions is None or dimensions == width:
        return
    if allowed is None:
        raise BadRequest(
            f"this model was not trained for vectors of other lengths than {width}",
            remedy="Leave dimensions out",
            param="dimensions",
        )
    if not 1 <= dimensions <= width or (allowed and dimensions not in allowed):
        lengths = ", ".join(map(str, allowed)) if allowed else f"1 to {width}"
        raise BadRequest(f"dimensions is {dimensions}, this model has {lengths}", param="dimensions")
