"""What the decoder-only architectures of this folder share: the fields of both formats to a ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from pagoda.arch import rope
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import Attention, Layer, Mlp, ModelSpec, Norms, Rope
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ACTIVATIONS = MappingProxyType(
    {
        **dict.fromkeys(("silu", "swish"), "silu"),
        **dict.fromkeys(("gelu_tanh", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
        "gelu": "gelu",
        "relu2": "relu2",
    }
)
"""What configs call the activations of an Mlp."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Which optional parts the layers of an architecture have."""

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qk_norm_late: bool = False
    gated: bool = True
    activation: str = "silu"
    norms: Norms = "before"
    interleaved: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True


def from_config(
    model_type: str,
    config: Fields,
    parts: Parts,
    *,
    head_dim: int | None = None,
    windows: Sequence[int | None] | None = None,
    norm_eps: str = "rms_norm_eps",
) -> ModelSpec:
    """`head_dim` is the default where the config gives none (None: hidden size / heads)."""
    _refuse_unsupported(config, parts.activation)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    size = config.integer("head_dim", head_dim or hidden // heads)
    count = config.integer("num_hidden_layers", most=MOST_LAYERS)
    rotation, max_position = rope.from_config(config, size, config.integer("max_position_embeddings"))
    bos = config.token_ids("bos_token_id")
    attention = _attention(config, heads, kv_heads, size, parts)
    mlp = Mlp(config.integer("intermediate_size"), parts.activation, parts.mlp_bias, parts.gated)
    return ModelSpec(
        model_type=model_type,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        norm_eps=config.number(norm_eps, 1e-6 if norm_eps == "rms_norm_eps" else 1e-5),
        tied=config.flag("tie_word_embeddings", False),
        max_position=max_position,
        rope=_checked(replace(rotation, interleaved=parts.interleaved), size, config),
        layers=_layers(Layer(attention, mlp, parts.norms), windows or [None] * count, max_position),
        eos_token_ids=config.token_ids("eos_token_id"),
        bos_token_id=bos[0] if bos else None,
        norm=parts.norm,
        norm_bias=parts.norm_bias,
    )


def from_gguf(
    model_type: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    interleaved: bool = False,
    qk_norm: bool = False,
    parts: Parts | None = None,
    prefix: str = "",
) -> ModelSpec:
    """GGUF has no flags for biases and tied heads: the tensors that are there say it. `prefix`: what the architecture
    is called there, where that is not `model_type`; the metadata of its decoder begin with it.
    """
    fields = Fields(metadata, "GGUF metadata", f"{prefix or model_type}.")
    if EMBEDDING not in tensors:
        raise ModelError(f"the checkpoint lacks the tensor {EMBEDDING}", remedy="Fetch the model again")
    hidden, heads = fields.integer("embedding_length"), fields.uniform_integer("attention.head_count")
    kv_heads = fields.uniform_integer("attention.head_count_kv", heads)
    size = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("attention.value_length", size) != size:
        raise fields.error("attention.value_length", "differs from attention.key_length, which is not supported")
    parts = replace(
        parts or Parts(interleaved=interleaved, qk_norm=qk_norm),
        qkv_bias=bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & tensors.keys()),
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
    )
    context = fields.integer("context_length")
    rotation, max_position = rope.from_gguf(fields, tensors, size, context, parts.interleaved)
    window = fields.integer("attention.sliding_window", 0, least=0) or None
    windows = [window] * fields.integer("block_count", most=MOST_LAYERS)
    attention = _attention(fields, heads, kv_heads, size, parts)
    mlp = Mlp(fields.uniform_integer("feed_forward_length"), parts.activation, parts.mlp_bias, parts.gated)
    norm_eps = "attention.layer_norm_rms_epsilon" if parts.norm == "rms" else "attention.layer_norm_epsilon"
    tokens = Fields(metadata, "GGUF metadata", "tokenizer.ggml.")
    ends = [i for name in ("eos", "eot", "eom") for i in tokens.token_ids(f"{name}_token_id")]
    bos = tokens.token_ids("bos_token_id")
    return ModelSpec(
        model_type=model_type,
        vocab_size=tensors[EMBEDDING].shape[0],
        hidden_size=hidden,
        norm_eps=fields.number(norm_eps),
        tied=HEAD not in tensors,
        max_position=max_position,
        rope=_checked(rotation, size, fields),
        layers=_layers(Layer(attention, mlp, parts.norms), windows, max_position),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=bos[0] if bos else None,
        norm=parts.norm,
        norm_bias=parts.norm_bias,
        head_bias="output.bias" in tensors,
    )


def sliding_windows(config: Fields) -> list[int | None]:
    """The window of each layer as Qwen's configs say it: by `layer_types`, or from layer `max_window_layers` on."""
    count = config.integer("num_hidden_layers", most=MOST_LAYERS)
    if not config.flag("use_sliding_window", False) or config.get("sliding_window") is None:
        return [None] * count
    window = config.integer("sliding_window")
    first = config.integer("max_window_layers", 28, least=0)
    return [window if sliding else None for sliding in layer_kinds(config, [i >= first for i in range(count)])]


def _refuse_unsupported(config: Fields, activation: str) -> None:
    given = config.get("hidden_act") or activation
    if not isinstance(given, str) or ACTIVATIONS.get(given) != activation:
        raise config.error("hidden_act", f"is {given!r}; this architecture is supported with {activation} only")


def _attention(fields: Fields, heads: int, kv_heads: int, head_dim: int, parts: Parts) -> Attention:
    if heads % kv_heads:
        raise ModelError(f"{fields.where}: {heads} attention heads cannot share {kv_heads} KV heads evenly")
    if not head_dim:
        raise ModelError(f"{fields.where}: {heads} attention heads are more than the hidden size")
    biases, norms = (parts.qkv_bias, parts.out_bias), (parts.qk_norm, parts.qk_norm_whole, parts.qk_norm_late)
    return Attention(heads, kv_heads, head_dim, head_dim**-0.5, *biases, *norms)


def _layers(layer: Layer, windows: Sequence[int | None], max_position: int) -> tuple[Layer, ...]:
    """One layer per window; a window that no context outgrows is none."""
    chosen = [w if w is not None and w < max_position else None for w in windows]
    return tuple(replace(layer, attention=replace(layer.attention, window=w)) for w in chosen)


def with_windows(spec: ModelSpec, sliding: Sequence[bool]) -> ModelSpec:
    """The spec with the sliding window only in the layers that `sliding` says."""
    chosen = zip(spec.layers, sliding, strict=True)
    layers = (
        layer if has else replace(layer, attention=replace(layer.attention, window=None)) for layer, has in chosen
    )
    return replace(spec, layers=tuple(layers))


def without_rope(spec: ModelSpec, still: Sequence[bool]) -> ModelSpec:
    """The spec with layers that turn nothing where `still` says so."""
    chosen = zip(spec.layers, still, strict=True)
    layers = (replace(layer, attention=replace(layer.attention, rope=not none)) for layer, none in chosen)
    return replace(spec, layers=tuple(layers))


def layer_kinds(config: Fields, default: Sequence[bool]) -> list[bool]:
    """Which layers have a sliding window, by `layer_types`; without that the default."""
    known = ("full_attention", "sliding_attention")
    return [kind == known[True] for kind in config.words("layer_types", known, [known[slides] for slides in default])]


def _checked(rotation: Rope, head_dim: int, fields: Fields) -> Rope:
    if rotation.dim % 2 or not 2 <= rotation.dim <= head_dim:
        raise ModelError(f"{fields.where}: rotary dimension {rotation.dim} does not fit heads of {head_dim}")
    return rotation
