"""The tensors of Gemmas and Nemotrons as other decoders have them: norms that are stored less 1 made whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import numpy as np

from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import Bytes, MadeTensor
from pagoda.weights.source import Tensor

_NORMS = re.compile(r"model\.norm\.weight|model\.layers\..*norm\.weight")


def gemma_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the weights of the language model's norms as they multiply."""
    return {name: _whole(t) if _NORMS.fullmatch(name) else t for name, t in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    return MadeTensor(tensor.name, tensor.shape, "F32", partial(_plus_one, tensor))


def _plus_one(tensor: Tensor) -> Bytes:
    return (dequantize(tensor) + np.float32(1)).reshape(-1).view(np.uint8)
