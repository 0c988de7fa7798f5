"""What each of several GPUs holds of one model (tensor parallel): the sizes that work, and exact bytes for each."""

from __future__ import annotations

from collections.abc import Mapping

from pagoda.arch.memory import Limits
from pagoda.arch.spec import ModelSpec
from pagoda.types import BLOCK_SIZE

VOCAB_MULTIPLE = 64
CONTEXT_BYTES = 768 << 20
"""CUDA's context, the libraries' work spaces and the captured graphs of one process."""
EXCHANGE_BYTES = 256 << 20
"""What one process takes beside that to talk to other GPUs."""

_LOGITS_BYTES, _TABLE_BYTES = 2 * 4, 4  # logits in float32 and a copy to sample from; RoPE tables in float32
_BY_VOCAB = ("embed", "head")
_BY_KV_HEADS = ("k", "v", "k_bias", "v_bias")
_WHOLE = ("norm", "attn_norm", "mlp_norm", "q_norm", "k_norm", "o_bias", "down_bias", "router")


def parallel_sizes(spec: ModelSpec, most: int, group: int = 1) -> list[int]:
    """Numbers of GPUs that can share the model. `group`: inputs that share a scale, where the weights have such."""
    return [size for size in range(1, most + 1) if all(_divides(spec, size, group))]


def _divides(spec: ModelSpec, size: int, group: int) -> list[bool]:
    return [
        layer.attention.heads % size == 0
        and (layer.attention.kv_heads % size == 0 or size % layer.attention.kv_heads == 0)
        and layer.attention.heads * layer.attention.head_dim // group % size == 0
        and layer.mlp.size // group % size == 0
        for layer in spec.layers
    ]


def weight_bytes(spec: ModelSpec, stored: Mapping[str, int], size: int) -> int:
    """Bytes of the weights on each of `size` GPUs; `stored` is what each slot takes in whole."""
    padded = -(-spec.vocab_size // (VOCAB_MULTIPLE * size)) * VOCAB_MULTIPLE
    kv_heads = spec.layers[0].attention.kv_heads
    total = 0
    for slot, count_bytes in stored.items():
        part = slot.rpartition(".")[2]
        if part in _BY_VOCAB:
            total += count_bytes * padded // spec.vocab_size
        elif part in _BY_KV_HEADS:
            total += count_bytes // min(size, kv_heads)  # more GPUs than KV heads: each head is on several
        else:
            total += count_bytes if part in _WHOLE else count_bytes // size
    return total


def kv_bytes_per_block(spec: ModelSpec, size: int, kv_itemsize: int = 2) -> int:
    """Keys and values of BLOCK_SIZE tokens on each GPU."""
    values = sum(2 * max(1, a.kv_heads // size) * a.head_dim for a in (layer.attention for layer in spec.layers))
    return values * BLOCK_SIZE * kv_itemsize


def activation_bytes(spec: ModelSpec, limits: Limits, size: int, itemsize: int = 2) -> int:
    """The largest step on each GPU: the widest layer's buffers once, the logits of every request, RoPE tables."""
    widest = max(
        2 * (a.heads // size + max(1, a.kv_heads // size)) * a.head_dim + 3 * m.width // size
        for a, m in ((layer.attention, layer.mlp) for layer in spec.layers)
    )
    tokens = limits.max_num_batched_tokens * (2 * spec.hidden_size + widest) * itemsize
    logits = limits.max_num_seqs * spec.vocab_size * _LOGITS_BYTES
    return tokens + logits + limits.max_model_len * spec.rope.dim * _TABLE_BYTES


def overhead_bytes(size: int) -> int:
    """What each process takes on its GPU before any weight is there."""
    return CONTEXT_BYTES + (EXCHANGE_BYTES if size > 1 else 0)
