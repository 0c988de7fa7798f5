"""GPT-2 and DialoGPT: layer norms, learned positions, and an MLP without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch.decoder import EMBEDDING, HEAD
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import Attention, Layer, Mlp, ModelSpec, Rope
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_ACTIVATIONS = MappingProxyType({"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"})


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    _refuse_unsupported(fields)
    hidden = fields.integer("n_embd")
    heads, inner = fields.integer("n_head"), fields.integer("n_inner", 4 * hidden)
    return _spec(
        _layer(fields, hidden, heads, inner, _activation(fields)),
        fields.integer("n_layer", most=MOST_LAYERS),
        fields,
        vocab_size=fields.integer("vocab_size"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        positions=fields.integer("n_positions"),
        tied=fields.flag("tie_word_embeddings", True),
    )


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", "gpt2.")
    if EMBEDDING not in tensors:
        raise ModelError(f"the checkpoint lacks the tensor {EMBEDDING}", remedy="Fetch the model again")
    hidden = fields.integer("embedding_length")
    heads, inner = fields.uniform_integer("attention.head_count"), fields.uniform_integer("feed_forward_length")
    return _spec(
        _layer(fields, hidden, heads, inner, "gelu_tanh"),
        fields.integer("block_count", most=MOST_LAYERS),
        Fields(metadata, "GGUF metadata", "tokenizer.ggml."),
        vocab_size=tensors[EMBEDDING].shape[0],
        norm_eps=fields.number("attention.layer_norm_epsilon"),
        positions=fields.integer("context_length"),
        tied=HEAD not in tensors,
    )


def _spec(
    layer: Layer, count: int, tokens: Fields, *, vocab_size: int, norm_eps: float, positions: int, tied: bool
) -> ModelSpec:
    bos = tokens.token_ids("bos_token_id")
    return ModelSpec(
        model_type="gpt2",
        vocab_size=vocab_size,
        hidden_size=layer.attention.heads * layer.attention.head_dim,
        norm_eps=norm_eps,
        tied=tied,
        max_position=positions,
        rope=Rope(0, ()),
        layers=(layer,) * count,
        eos_token_ids=tokens.token_ids("eos_token_id"),
        bos_token_id=bos[0] if bos else None,
        norm="layer",
        positions=positions,
    )


def _layer(fields: Fields, hidden: int, heads: int, inner: int, activation: str) -> Layer:
    if hidden % heads:
        raise ModelError(f"{fields.where}: a hidden size of {hidden} cannot be cut into {heads} heads")
    size = hidden // heads
    return Layer(
        Attention(heads, heads, size, size**-0.5, qkv_bias=True, out_bias=True),
        Mlp(inner, activation=activation, bias=True, gated=False),
    )


def _activation(fields: Fields) -> str:
    name = fields.get("activation_function") or "gelu_new"
    if name not in _ACTIVATIONS:
        raise fields.error("activation_function", f"is {name!r}; GPT-2 is supported with {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _refuse_unsupported(fields: Fields) -> None:
    for name, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if fields.flag(name, usual) != usual:
            raise fields.error(name, f"is {str(not usual).lower()}, which is not supported")
