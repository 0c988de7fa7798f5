"""How many bytes a model needs, by exact arithmetic: weights, KV cache, activations; and how many blocks fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from pagoda.arch.spec import Layer, ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.errors import MemoryShort
from pagoda.options.formats import KV_EIGHT_BITS
from pagoda.types import BLOCK_SIZE
from pagoda.weights.source import Tensor

KvType = Literal["float32", "float16", "int8", "fp8"]
"""How keys and values are kept (float16: any 16 bits); int8 has an f16 scale for each KV_GROUP values of a head."""

KV_GROUP = 32
AUTO_CACHE_BYTES = 4 << 30
AUTO_STATES_BYTES = 4 << 30
FLOAT32_BYTES = 4
MOST_IMAGE_TOKENS = 16384
"""Tokens of the largest picture that memory is set aside for: 3584 x 3584 pixels with patches of 14."""
VISION_TILE = 2048
"""Patches that go through the MLP of a vision encoder at a time."""
DEFAULT_SHARE = 0.9
MOST_SHARE = 0.98
_ANY_NUMBER = 2**31 - 1


class Limits(Protocol):
    """The limits that memory depends on (`backend.base.Limits` has them)."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def memory_share(self) -> float | None: ...
    @property
    def kv_cache_bytes(self) -> int | None: ...
    @property
    def num_blocks(self) -> int | None: ...
    @property
    def max_loras(self) -> int: ...
    @property
    def max_lora_rank(self) -> int: ...
    @property
    def kept_states(self) -> int: ...


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def kv_type(asked: str) -> KvType:
    """What a CPU makes of --kv-cache-dtype: fp8 asks for 8 bits, and whole numbers with scales are nearer than fp8."""
    return "int8" if asked in KV_EIGHT_BITS else "float16"


def kv_bytes_per_block(spec: ModelSpec, kv_type: KvType = "float16") -> int:
    """Keys and values of BLOCK_SIZE tokens in all layers; encoders keep none."""
    if spec.encoder is not None:
        return 0
    attentions = [layer.attention for layer in spec.layers if layer.delta is None]
    return BLOCK_SIZE * sum(a.kept * _head_bytes(a.head_dim, kv_type) for a in attentions)


def state_bytes(spec: ModelSpec) -> int:
    """What one running request keeps beside the cache, whatever its length: the states of its linear attention."""
    return sum(layer.delta.state_bytes for layer in spec.layers if layer.delta is not None)


def usual_requests(spec: ModelSpec, most: int) -> int:
    """How many run at once where nobody says: as many as have room for their states."""
    each = state_bytes(spec)
    return max(1, min(most, AUTO_STATES_BYTES // each)) if each else most


def kept_states(limits: Limits, each_bytes: int, left_bytes: int, cache_bytes: int) -> int:
    """How many states of prefixes are kept: in at most a quarter of what is left, and not at the cost of the cache that
    must be there."""
    if not each_bytes:
        return 0
    room_bytes = max(0, min(left_bytes // 4, AUTO_STATES_BYTES, left_bytes - cache_bytes))
    return min(limits.kept_states, room_bytes // each_bytes)


def _head_bytes(head_dim: int, kv_type: KvType) -> int:
    if kv_type == "int8":
        return head_dim + 2 * -(-head_dim // KV_GROUP)
    return head_dim * {"float32": 4, "float16": 2, "fp8": 1}[kv_type]


def weight_bytes(bound: Mapping[str, Tensor]) -> int:
    """The bound tensors as they are stored."""
    return sum(tensor.nbytes for tensor in bound.values())


def float32_weight_bytes(spec: ModelSpec) -> int:
    """The weights once all are float32."""
    return FLOAT32_BYTES * sum(math.prod(shape) for shape in spec.slots().values())


def activation_bytes(spec: ModelSpec, limits: Limits) -> int:
    """Float32 scratch of the largest step: each buffer of the widest layer once, logits of every request, RoPE tables.

    Buffers per token: the hidden state and its norm, q and the attention output, k, v, gate and up. The work of a
    vision encoder is part of it.
    """
    widest = max(_layer_values(layer) for layer in spec.layers)
    own = spec.layer_embed * len(spec.layers)
    tokens = limits.max_num_batched_tokens * (2 * spec.hidden_size + widest + own)
    logits = limits.max_num_seqs * spec.vocab_size
    tables = limits.max_model_len * sum(rope.dim for rope in spec.ropes)
    return FLOAT32_BYTES * (tokens + logits + tables) + vision_bytes(spec, limits.max_model_len)


def _layer_values(layer: Layer) -> int:
    a, d = layer.attention, layer.delta
    if d is not None:
        return d.width + 2 * (d.value_width + d.value_heads + layer.mlp.width)
    return (2 * (a.heads + a.kv_heads) + a.heads * a.out_gate) * a.head_dim + 2 * layer.mlp.width


def encoded_bytes(spec: ModelSpec, max_model_len: int, itemsize: int = FLOAT32_BYTES) -> int:
    """The vectors of images that are kept for steps to come: as many as one of the largest has."""
    vectors = 1 if spec.vision is None else spec.vision.vectors
    return min(max_model_len, MOST_IMAGE_TOKENS) * vectors * spec.hidden_size * itemsize


def most_patches(vision: Vision, max_model_len: int) -> int:
    """Of the largest picture that memory is set aside for."""
    return (vision.side**2 or min(max_model_len, MOST_IMAGE_TOKENS) * vision.merge_size**2) + vision.class_token


def vision_bytes(spec: ModelSpec, max_model_len: int, itemsize: int = FLOAT32_BYTES) -> int:
    """What a vision encoder works in for the largest picture, and the vectors that are kept; 0 for other models.

    Of each patch: its pixels, x and its norm, q, k, v and the attention output; the MLP goes by VISION_TILE patches.
    """
    v = spec.vision
    if v is None:
        return 0
    count = most_patches(v, max_model_len)
    vectors = 8 if v.grid == "cubic" else 6  # positions between those of the model are made for each picture
    work = count * (v.patch_values + vectors * v.hidden_size) + min(count, VISION_TILE) * 2 * v.intermediate_size
    return work * itemsize + encoded_bytes(spec, max_model_len, itemsize)


def blocks_that_fit(spec: ModelSpec, free_bytes: int, kv_type: KvType = "float16") -> int:
    per_block = kv_bytes_per_block(spec, kv_type)
    if not per_block:
        return _ANY_NUMBER if free_bytes >= 0 else 0
    return max(0, free_bytes) // per_block


class Fit(NamedTuple):
    """Blocks of the cache, and states of prefixes."""

    blocks: int
    kept_states: int


def fit(
    spec: ModelSpec,
    limits: Limits,
    *,
    free_bytes: int,
    weight_bytes: int,
    activation_bytes: int,
    kv_type: KvType = "float16",
    used_bytes: int = 0,
    used_by: str = "",
) -> Fit:
    """The number of cache blocks to take, at most what all requests together can fill; and of states to keep.

    The share is one of `free_bytes`; of it `used_bytes` are held already (a GPU, where the share is one of the whole),
    and `used_by` says by whom.

    MemoryShort, with what would fit, if not one request of `max_model_len` tokens fits. The model's own maximum is
    the exception: it stands for "auto" too, so fewer blocks are returned and the engine serves shorter contexts.
    Without `memory_share` the cache takes no more than half of what is left, nor more than AUTO_CACHE_BYTES, unless
    one request needs more: old prefixes fill whatever it may take.
    """
    share = DEFAULT_SHARE if limits.memory_share is None else limits.memory_share
    pool = _Pool(free_bytes, share, used_bytes, used_by)
    states = limits.max_num_seqs * state_bytes(spec)
    left_bytes = pool.usable_bytes - weight_bytes - activation_bytes - states
    kept = kept_states(limits, state_bytes(spec), left_bytes, _asked_bytes(spec, limits, kv_type))
    left_bytes -= kept * state_bytes(spec)
    fitting = blocks_that_fit(spec, left_bytes, kv_type)
    one, wanted = blocks_for(limits.max_model_len), _wanted(spec, limits, kv_type, fitting)
    enough = 1 if limits.max_model_len >= spec.max_position else one
    if enough <= wanted <= fitting:
        return Fit(wanted, kept)
    asked = limits.num_blocks is not None or limits.kv_cache_bytes is not None
    if asked and wanted < enough:
        cures = [*_length(min(wanted, fitting), limits), "more --kv-cache-memory-bytes or --num-gpu-blocks-override"]
        raise MemoryShort(
            f"the KV cache that was asked for holds {wanted * BLOCK_SIZE} tokens, fewer than one request may have",
            remedy=_any_of(cures),
        )
    blocks = max(wanted, one)
    need = {"weights": weight_bytes, "activations": activation_bytes}
    if states:
        need[f"the states of {limits.max_num_seqs} requests"] = states
    if spec.encoder is None:
        need[f"a KV cache of {blocks * BLOCK_SIZE} tokens"] = blocks * kv_bytes_per_block(spec, kv_type)
    raise _short(limits, need, pool, fitting)


def _wanted(spec: ModelSpec, limits: Limits, kv_type: KvType, fitting: int) -> int:
    """Blocks to take, if as many fit."""
    one = blocks_for(limits.max_model_len)
    everyone = limits.max_num_seqs * one
    if spec.encoder is not None:
        return everyone
    if limits.num_blocks is not None:
        return limits.num_blocks
    if limits.kv_cache_bytes is not None:
        return blocks_that_fit(spec, limits.kv_cache_bytes, kv_type)
    if limits.memory_share is not None:
        return min(everyone, fitting)
    return min(everyone, max(min(fitting // 2, blocks_that_fit(spec, AUTO_CACHE_BYTES, kv_type)), min(one, fitting)))


def _asked_bytes(spec: ModelSpec, limits: Limits, kv_type: KvType) -> int:
    """Of the least cache that is to be there."""
    if limits.num_blocks is None and limits.kv_cache_bytes is not None:
        return limits.kv_cache_bytes
    blocks = blocks_for(limits.max_model_len) if limits.num_blocks is None else limits.num_blocks
    return blocks * kv_bytes_per_block(spec, kv_type)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Memory of which a share may be used, less what is held already."""

    total_bytes: int
    share: float
    used_bytes: int
    used_by: str

    @property
    def usable_bytes(self) -> int:
        return max(0, int(self.total_bytes * self.share) - self.used_bytes)

    def __str__(self) -> str:
        held = f" of the GPU, of which {self.used_by}" if self.used_by else " that is free"
        return (
            f"{size_text(self.usable_bytes)} may be used, {self.share:.0%} of the {size_text(self.total_bytes)}{held}"
        )


def _short(limits: Limits, need: Mapping[str, int], pool: _Pool, fitting: int) -> MemoryShort:
    total = sum(need.values())
    parts = ", ".join(f"{size_text(size)} for {name}" for name, size in need.items())
    message = f"the model needs {size_text(total)} of memory ({parts}); {pool}"
    cures = _length(fitting, limits)
    if fitting and limits.num_blocks is not None:
        cures.append(f"--num-gpu-blocks-override {fitting}")
    elif fitting and limits.kv_cache_bytes is not None:
        cures.append("a smaller --kv-cache-memory-bytes")
    held = total + pool.used_bytes
    needed_share = math.ceil(100 * held / pool.total_bytes) / 100 if pool.total_bytes else math.inf
    if pool.share < needed_share <= MOST_SHARE:
        cures.append(f"--gpu-memory-utilization {needed_share:.2f}")
    if limits.max_num_seqs > 1 and any("states" in name for name in need):
        cures.append("fewer --max-num-seqs")
    hopeless = ["a smaller model", "a smaller quantization of this one", "fewer --max-num-batched-tokens"]
    return MemoryShort(message, remedy=_any_of(cures or hopeless))


def _length(fitting: int, limits: Limits) -> list[str]:
    """The longest context that `fitting` blocks hold, as an option, where it is shorter than the one asked for."""
    length = fitting * BLOCK_SIZE
    return [f"--max-model-len {length}"] if 0 < length < limits.max_model_len else []


def _any_of(cures: list[str]) -> str:
    return "What would fit: " + ", or ".join(cures)


def size_text(size_bytes: int) -> str:
    """A size for people."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
