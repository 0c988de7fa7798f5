"""A Gemma's tensors as other decoders have them: none for pictures, norms that are stored less 1 made whole."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from pagoda.arch.names.visual import language_tensors
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import Bytes, MadeTensor
from pagoda.weights.source import Tensor


def gemma_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Gemma's tensors, those of its language model alone, with the norms' weights as they multiply."""
    language = language_tensors(tensors).items()
    return {name: _whole(t) if name.endswith("norm.weight") else t for name, t in language}


def _whole(tensor: Tensor) -> Tensor:
    return MadeTensor(tensor.name, tensor.shape, "F32", partial(_plus_one, tensor))


def _plus_one(tensor: Tensor) -> Bytes:
    return (dequantize(tensor) + np.float32(1)).reshape(-1).view(np.uint8)
