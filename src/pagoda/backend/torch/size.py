"""How large stored tensors are once they are on the device, before any is read."""

from __future__ import annotations

from collections.abc import Mapping

from pagoda.backend.torch.convert import Target
from pagoda.weights.device_size import tensor_bytes
from pagoda.weights.source import Tensor


def weight_bytes(bound: Mapping[str, Tensor], target: Target) -> int:
    """All tensors of a model, by slot."""
    return sum(tensor_bytes(slot, t, target.quantization, target.dtype.itemsize) for slot, t in bound.items())
