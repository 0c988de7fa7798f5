"""What the encoder architectures of this folder share: the fields of both formats to a ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import rope
from pagoda.arch.decoder import ACTIVATIONS, EMBEDDING
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import Attention, Encoder, Layer, Mlp, ModelSpec, Rope
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_UNTURNED = Rope(0, ())


def from_config(model_type: str, config: Mapping[str, Any], *, padded: bool) -> ModelSpec:
    """BERT's layers with a table of positions. `padded`: these are counted from behind the padding token's id, as
    RoBERTa does."""
    fields = Fields(config, "config.json")
    kind = fields.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise fields.error("position_embedding_type", f"is {kind!r}; here it is supported with absolute only")
    first = fields.integer("pad_token_id", 1, least=0) + 1 if padded else 0
    positions = fields.integer("max_position_embeddings", least=first + 1)
    mlp = Mlp(fields.integer("intermediate_size"), activation(fields, "gelu"), bias=True, gated=False)
    layer = Layer(attention(fields, turned=False, bias=True), mlp, "sum")
    encoder = Encoder(first, fields.integer("type_vocab_size", 2))
    spec = assembled(model_type, fields, layer, encoder, fields.number("layer_norm_eps", 1e-12))
    return replace(spec, max_position=positions - first, positions=positions)


def turning(model_type: str, config: Mapping[str, Any], mlp: Mlp, *, theta: float, bias: bool) -> ModelSpec:
    """BERT's layers with rotary embeddings in place of a table of positions. `theta`: their base, where the config
    gives none."""
    fields = Fields({"rope_theta": theta, **config}, "config.json")
    mlp = replace(mlp, size=fields.integer("intermediate_size"), activation=activation(fields, mlp.activation))
    layer = Layer(attention(fields, turned=True, bias=bias), mlp, "sum")
    encoder = Encoder(token_types=fields.integer("type_vocab_size", 1, least=0))
    spec = assembled(model_type, fields, layer, encoder, fields.number("layer_norm_eps", 1e-12))
    rotation, longest = rope.from_config(fields, layer.attention.head_dim, spec.max_position)
    return replace(spec, rope=rotation, max_position=longest)


def assembled(model_type: str, fields: Fields, layer: Layer, encoder: Encoder, eps: float) -> ModelSpec:
    """A spec with this layer in all places, which turns nothing yet."""
    if fields.get("is_decoder"):
        raise fields.error("is_decoder", "is true, which is not supported")
    return ModelSpec(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        norm_eps=eps,
        tied=True,
        max_position=fields.integer("max_position_embeddings"),
        rope=_UNTURNED,
        layers=(layer,) * fields.integer("num_hidden_layers", most=MOST_LAYERS),
        encoder=encoder,
        norm="layer",
    )


def attention(fields: Fields, *, turned: bool, bias: bool) -> Attention:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    size = fields.integer("head_dim", hidden // heads)
    if size * heads != hidden:
        raise ModelError(f"{fields.where}: a hidden size of {hidden} cannot be cut into {heads} heads")
    return Attention(heads, heads, size, size**-0.5, qkv_bias=bias, out_bias=bias, rope=turned)


def activation(fields: Fields, usual: str, name: str = "hidden_act") -> str:
    given = fields.get(name) or usual
    if given not in ACTIVATIONS:
        raise fields.error(name, f"is {given!r}; encoders are supported with {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[given]


def from_gguf(model_type: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    """BERT's layers, with a table of positions if the file has one, else with rotary embeddings."""
    fields = gguf_fields(metadata, tensors)
    size, gate = fields.integer("feed_forward_length"), "blk.0.ffn_gate.weight" in tensors
    biases = [f"blk.0.{name}.bias" in tensors for name in ("ffn_up", "ffn_down")]
    mlp = Mlp(size, "silu" if gate else "gelu", bias=biases[0], gated=gate, down_bias=biases[1])
    positions = tensors["position_embd.weight"].shape[0] if "position_embd.weight" in tensors else 0
    layer = Layer(gguf_attention(fields, tensors, turned=not positions), mlp, "sum")
    spec = gguf_assembled(model_type, fields, tensors, layer)
    if positions:
        return replace(spec, max_position=min(positions, spec.max_position), positions=positions)
    rotation, longest = rope.from_gguf(fields, tensors, layer.attention.head_dim, spec.max_position, False)
    return replace(spec, rope=rotation, max_position=longest)


def gguf_fields(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Fields:
    fields = Fields(metadata, "GGUF metadata", f"{metadata['general.architecture']}.")
    if EMBEDDING not in tensors:
        raise ModelError(f"the checkpoint lacks the tensor {EMBEDDING}", remedy="Fetch the model again")
    if fields.flag("attention.causal", False):
        raise fields.error("attention.causal", "is true, which is not supported")
    return fields


def gguf_attention(fields: Fields, tensors: Mapping[str, Tensor], *, turned: bool) -> Attention:
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    size = hidden // heads
    if size * heads != hidden:
        raise ModelError(f"{fields.where}: a hidden size of {hidden} cannot be cut into {heads} heads")
    bias = bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & tensors.keys())
    out = "blk.0.attn_output.bias" in tensors
    return Attention(heads, heads, size, size**-0.5, qkv_bias=bias, out_bias=out, rope=turned)


def gguf_assembled(model_type: str, fields: Fields, tensors: Mapping[str, Tensor], layer: Layer) -> ModelSpec:
    types = tensors["token_types.weight"].shape[0] if "token_types.weight" in tensors else 0
    return ModelSpec(
        model_type=model_type,
        vocab_size=tensors[EMBEDDING].shape[0],
        hidden_size=fields.integer("embedding_length"),
        norm_eps=fields.number("attention.layer_norm_epsilon"),
        tied=True,
        max_position=fields.integer("context_length"),
        rope=_UNTURNED,
        layers=(layer,) * fields.integer("block_count", most=MOST_LAYERS),
        encoder=Encoder(token_types=types),
        norm="layer",
    )
