"""How many bytes a model needs, by exact arithmetic: weights, KV cache, activations, and what fits."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pagoda.arch.spec import ModelSpec
from pagoda.errors import MemoryShort
from pagoda.types import BLOCK_SIZE
from pagoda.weights.source import Tensor

FLOAT32_BYTES = 4
SMALL_STEP_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """The limits that memory depends on."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def blocks_per_request(self) -> int:
        return -(-self.max_model_len // BLOCK_SIZE)


def kv_bytes_per_block(spec: ModelSpec, kv_itemsize: int = 2) -> int:
    """Keys and values of BLOCK_SIZE tokens in all layers."""
    values = sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in spec.layers)
    return values * BLOCK_SIZE * kv_itemsize


def weight_bytes(bound: Mapping[str, Tensor]) -> int:
    """The bound tensors as they are stored."""
    return sum(tensor.nbytes for tensor in bound.values())


def float32_weight_bytes(spec: ModelSpec) -> int:
    """All weights once they are float32."""
    total = 0
    for shape in spec.slots().values():
        rows, columns = (*shape, 1)[:2]
        total += rows * columns * FLOAT32_BYTES
    return total
