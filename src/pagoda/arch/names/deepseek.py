"""What DeepSeek's kind of mixtures have in their checkpoints beside the tensors of their layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

FAMILIES = frozenset({"glm4_moe"})
_LAYER = re.compile(r"(?:model\.layers|blk)\.(\d+)\..+")
_CHOICE_BIAS = re.compile(r"(.+\.e_score_correction)_(bias)")


def deepseek_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model's layers, under the spelling of other decoders."""
    return dict(found for name, tensor in tensors.items() for found in _each(spec, name, tensor))


def _each(spec: ModelSpec, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    layer = _LAYER.fullmatch(name)
    if layer is not None and int(layer[1]) >= len(spec.layers):
        return  # of blocks that predict several tokens at once, which no step does
    yield _CHOICE_BIAS.sub(r"\1.\2", name), tensor
