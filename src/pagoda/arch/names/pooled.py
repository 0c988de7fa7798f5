"""What checkpoints of pooled models may hold that no slot needs, and the layers that they have behind the pooling."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pagoda.arch.names.encoders import FAMILIES, encoder_tensors
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

# heads that were trained beside the model, and tables that hold 0, 1, 2, ...
_UNUSED = re.compile(
    r"(pooler|cls|classifier|lm_head|score|qa_outputs|head|decoder)\..*|output\.weight"
    r"|embeddings\.(position_ids|token_type_ids)"
)


def plain_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pooled model's tensors under one spelling: such models are stored with and without their outer class."""
    if spec.model_type in FAMILIES:
        return encoder_tensors(spec, tensors)
    return {f"model.{old}" if _is_inner(old) else old: tensor for old, tensor in tensors.items()}


def projection_name(spec: ModelSpec, slot: str) -> str:
    """The name of the tensor of a layer behind the pooling, such as `2_Dense.linear.weight`."""
    number = slot.removeprefix("project.").removesuffix("_bias")
    each = spec.pooling.projections[int(number)] if spec.pooling is not None else None
    return f"{each.name if each else slot}.{'bias' if slot.endswith('_bias') else 'weight'}"


def unused(name: str) -> bool:
    return _UNUSED.fullmatch(name) is not None


def _is_inner(name: str) -> bool:
    return name.startswith(("layers.", "embed_tokens.", "norm."))
