"""What each of several GPUs holds of one model (tensor parallel): the sizes that work, and exact bytes for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pagoda.arch.memory import Limits, vision_bytes
from pagoda.arch.spec import Attention, Layer, Mlp, ModelSpec
from pagoda.errors import ConfigError, ModelError
from pagoda.types import BLOCK_SIZE
from pagoda.weights.parts import INPUTS, OUTPUTS, STACK, part
from pagoda.weights.source import Tensor

VOCAB_MULTIPLE = 64
CONTEXT_BYTES = 768 << 20
"""CUDA's context, the libraries' work spaces and the captured graphs of one process."""
EXCHANGE_BYTES = 256 << 20
"""What one process takes beside that to talk to other GPUs."""

_LOGITS_BYTES, _TABLE_BYTES = 2 * 4, 4  # logits in float32 and a copy to sample from; RoPE tables in float32
_BY_VOCAB = ("embed", "head", "head_bias")
_BY_KV_HEADS = ("k", "v", "k_bias", "v_bias")
_BY_HEADS = ("q", "q_bias", "q_gate", "sinks", "q_b", "k_b", "v_b")
_BY_MLP = ("gate", "up", "gate_bias", "up_bias", "gate_experts", "up_experts")
_EXPERT_BIASES = ("gate_experts_bias", "up_experts_bias")
_INPUTS_BY_HEADS, _INPUTS_BY_MLP = ("o",), ("down", "down_experts")
_ONCE = ("o_bias", "down_bias", "down_experts_bias")  # added to a sum over all GPUs
_MOST = 16
_WHOLE = (
    *("norm", "attn_norm", "mlp_norm", "norm_bias", "attn_norm_bias", "mlp_norm_bias", "q_norm", "k_norm"),
    *("attn_post_norm", "mlp_post_norm", "attn_post_norm_bias", "mlp_post_norm_bias"),
    *("positions", "o_bias", "down_bias", "down_experts_bias", "router", "router_bias", "router_shared"),
    *("router_choice_bias", "q_a", "q_a_norm", "kv_a", "kv_a_norm"),
    *("layer_embed", "layer_project", "layer_project_norm", "own_gate", "own_out", "own_post_norm", "scale"),
)
_BY_SHARED, _INPUTS_BY_SHARED = ("gate_shared", "up_shared"), ("down_shared",)
_STACKED_HEADS = ("k_b", "v_b")
_LAST_AXIS_CUT = (*_INPUTS_BY_HEADS, *_INPUTS_BY_MLP, *_INPUTS_BY_SHARED, *_EXPERT_BIASES)


def parallel_sizes(spec: ModelSpec, most: int, group: int = 1) -> list[int]:
    """Numbers of GPUs that can share the model. `group`: inputs that share a scale, where the weights have such."""
    return [size for size in range(1, most + 1) if all(_divides(spec, size, group)) and _last_has_some(spec, size)]


def _last_has_some(spec: ModelSpec, size: int) -> bool:
    first, last = vocab_range(spec, size - 1, size)
    return first < last


def _divides(spec: ModelSpec, size: int, group: int) -> list[bool]:
    return [layer.delta.divides(size, group) for layer in spec.layers if layer.delta is not None] + [
        layer.attention.heads % size == 0
        and (layer.attention.kv_heads % size == 0 or size % layer.attention.kv_heads == 0)
        and layer.attention.out_width // group % size == 0
        and layer.mlp.size // group % size == 0
        and _shared(layer.mlp) // group % size == 0
        and (size == 1 or not (layer.attention.qk_norm_whole or _own_norms(layer.mlp)))
        for layer in spec.layers
    ]


def check_size(spec: ModelSpec, tensors: Mapping[str, Tensor], size: int) -> None:
    """ConfigError, with the sizes that work, for a number of GPUs that cannot share the model; reads no weight."""
    if _can_share(spec, tensors, size):
        return
    works = [str(other) for other in range(1, _MOST + 1) if _can_share(spec, tensors, other)]
    raise ConfigError(
        f"--tensor-parallel-size {size} cannot work with this model: its heads and matrices do not divide by {size}",
        remedy=f"Sizes that work: {', '.join(works)}",
        param="tensor_parallel_size",
    )


def _can_share(spec: ModelSpec, tensors: Mapping[str, Tensor], size: int) -> bool:
    if size not in parallel_sizes(spec, size):
        return False
    try:
        for rank in range(size):
            share(spec, tensors, rank, size)
    except ModelError:
        return False
    return True


def share(spec: ModelSpec, tensors: Mapping[str, Tensor], rank: int, size: int) -> tuple[ModelSpec, dict[str, Tensor]]:
    """What one of `size` GPUs holds: the spec with its heads and widths, the tensors with its part of each.

    Where there are fewer KV heads than GPUs, each is on several. `vocab_size` stays that of the model.
    """
    bound: dict[str, Tensor] = {}
    for slot, tensor in tensors.items():
        name = slot.rpartition(".")[2]
        if slot.startswith("vision."):
            if not rank:
                bound[slot] = tensor  # the first encodes images, and gives the others what comes of it
            continue
        if name in _ONCE and rank:
            continue
        layer = spec.layers[int(slot.split(".")[1])] if slot.startswith("layers.") else None
        cut = _cut_of(spec, layer, name, rank, size)
        axis = INPUTS if len(tensor.shape) == 1 or name in _LAST_AXIS_CUT else OUTPUTS
        axis = STACK if name in _STACKED_HEADS else axis
        bound[slot] = tensor if cut is None else part(tensor, axis, *cut)
    layers = tuple(
        replace(
            layer,
            attention=replace(
                layer.attention, heads=layer.attention.heads // size, kv_heads=_kv_heads(layer.attention, size)
            ),
            mlp=_mlp_share(layer.mlp, size),
            delta=layer.delta and layer.delta.share(size),
        )
        for layer in spec.layers
    )
    return replace(spec, layers=layers, vision=None if rank else spec.vision), bound


def vocab_range(spec: ModelSpec, rank: int, size: int) -> tuple[int, int]:
    """First and last token, exclusive, of those whose embeddings a GPU holds."""
    each = -(-spec.vocab_size // (VOCAB_MULTIPLE * size)) * VOCAB_MULTIPLE
    return min(rank * each, spec.vocab_size), min((rank + 1) * each, spec.vocab_size)


def _cut_of(spec: ModelSpec, layer: Layer | None, name: str, rank: int, size: int) -> tuple[int, int] | None:
    """Which places of a tensor are this GPU's; None: all."""
    if layer is None:
        return vocab_range(spec, rank, size) if name in _BY_VOCAB else None
    a = layer.attention
    if layer.delta is not None and (width := layer.delta.cut_width(name)):
        return rank * width // size, (rank + 1) * width // size
    if name in (*_BY_HEADS, *_INPUTS_BY_HEADS):
        whole = {"sinks": a.heads, "k_b": a.heads, "v_b": a.heads, "o": a.out_width}.get(name, a.q_width)
        each = whole // size
    elif name in (*_BY_MLP, *_INPUTS_BY_MLP, *_EXPERT_BIASES):
        each = layer.mlp.size // size
    elif name in (*_BY_SHARED, *_INPUTS_BY_SHARED):
        each = _shared(layer.mlp) // size
    elif name in _BY_KV_HEADS:
        each = _kv_heads(a, size) * a.head_dim
        rank = min(rank, rank * a.kv_heads // size)
    else:
        return None
    return rank * each, (rank + 1) * each


def state_bytes(spec: ModelSpec, size: int) -> int:
    """What one running request keeps beside the cache on each GPU."""
    return sum(layer.delta.share(size).state_bytes for layer in spec.layers if layer.delta is not None)


def _shared(mlp: Mlp) -> int:
    return mlp.experts.shared if mlp.experts is not None else 0


def _own_norms(mlp: Mlp) -> bool:
    return mlp.experts is not None and mlp.experts.own_norms


def _mlp_share(mlp: Mlp, size: int) -> Mlp:
    experts = mlp.experts and replace(mlp.experts, shared=mlp.experts.shared // size)
    return replace(mlp, size=mlp.size // size, experts=experts)


def _kv_heads(attention: Attention, size: int) -> int:
    return max(1, attention.kv_heads // size)


def weight_bytes(spec: ModelSpec, stored: Mapping[str, int], size: int) -> int:
    """Bytes of the weights on the first of `size` GPUs, which has most; `stored` is what each slot takes in whole."""
    first, last = vocab_range(spec, 0, size)
    total = 0
    for slot, count_bytes in stored.items():
        part = slot.rpartition(".")[2]
        if slot.startswith("vision."):
            total += count_bytes
        elif part in _BY_VOCAB:
            total += count_bytes * (last - first) // spec.vocab_size
        elif part in _BY_KV_HEADS and (layer := spec.layers[int(slot.split(".")[1])]).delta is None:
            total += count_bytes // min(
                size, layer.attention.kv_heads
            )  # more GPUs than KV heads: each head is on several
        else:
            total += count_bytes if part in _WHOLE or _is_norm_of_one_head(spec, slot) else count_bytes // size
    return total


def _is_norm_of_one_head(spec: ModelSpec, slot: str) -> bool:
    """That of a delta net is the same for all its heads."""
    delta = spec.layers[int(slot.split(".")[1])].delta if slot.endswith(".z_norm") else None
    return delta is not None and not delta.cut_width("z_norm")


def kv_bytes_per_block(spec: ModelSpec, size: int, kv_itemsize: int = 2) -> int:
    """Keys and values of BLOCK_SIZE tokens on each GPU."""
    attentions = [layer.attention for layer in spec.layers if layer.delta is None]
    values = sum(a.kept * a.head_dim * _kv_heads(a, size) // a.kv_heads for a in attentions)
    return values * BLOCK_SIZE * kv_itemsize


def activation_bytes(spec: ModelSpec, limits: Limits, size: int, itemsize: int = 2) -> int:
    """The largest step on each GPU: the widest layer's buffers once, the logits of every request, RoPE tables."""
    widest = max(_mixer_values(layer, size) + 3 * layer.mlp.width // size for layer in spec.layers)
    own = spec.layer_embed * len(spec.layers)
    tokens = limits.max_num_batched_tokens * (2 * spec.hidden_size + widest + own) * itemsize
    logits = limits.max_num_seqs * spec.vocab_size * _LOGITS_BYTES
    tables = limits.max_model_len * sum(rope.dim for rope in spec.ropes) * _TABLE_BYTES
    return tokens + logits + tables + vision_bytes(spec, limits.max_model_len, itemsize)


def _mixer_values(layer: Layer, size: int) -> int:
    """Of a token, what the layer's attention works in, or its delta net: in float32 between its kernels."""
    a, d = layer.attention, layer.delta
    if d is not None:
        return (d.width + 5 * d.value_width + 2 * d.value_heads) // size
    q = a.heads // size * a.head_dim
    return (5 if a.out_gate else 2) * q + 2 * _kv_heads(a, size) * a.head_dim


def overhead_bytes(size: int) -> int:
    """What each process takes on its GPU before any weight is there."""
    return CONTEXT_BYTES + (EXCHANGE_BYTES if size > 1 else 0)
