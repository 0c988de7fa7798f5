"""What the encoder architectures of this folder share: the fields of config.json to a ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import Attention, Encoder, Layer, Mlp, ModelSpec, Rope
from pagoda.errors import ModelError


def from_config(model_type: str, config: Mapping[str, Any], *, padded: bool) -> ModelSpec:
    """`padded`: positions are counted from behind the padding token's id, as RoBERTa does."""
    fields = Fields(config, "config.json")
    _refuse_unsupported(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads:
        raise ModelError(f"config.json: a hidden size of {hidden} cannot be cut into {heads} heads")
    size = hidden // heads
    first = fields.integer("pad_token_id", 1, least=0) + 1 if padded else 0
    positions = fields.integer("max_position_embeddings", least=first + 1)
    layer = Layer(
        Attention(heads, heads, size, size**-0.5, qkv_bias=True, out_bias=True),
        Mlp(fields.integer("intermediate_size"), activation="gelu", bias=True, gated=False),
    )
    return ModelSpec(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        tied=True,
        max_position=positions - first,
        rope=Rope(0, ()),
        layers=(layer,) * fields.integer("num_hidden_layers", most=MOST_LAYERS),
        encoder=Encoder(first, fields.integer("type_vocab_size", 2)),
        norm="layer",
        positions=positions,
    )


def no_gguf(model_type: str) -> ModelError:
    return ModelError(f"{model_type} models are not read from GGUF", remedy="Take the model's safetensors version")


def _refuse_unsupported(fields: Fields) -> None:
    activation = fields.get("hidden_act") or "gelu"
    if activation != "gelu":
        raise fields.error("hidden_act", f"is {activation!r}; encoders are supported with gelu only")
    positions = fields.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise fields.error("position_embedding_type", f"is {positions!r}; encoders are supported with absolute only")
    if fields.get("is_decoder"):
        raise fields.error("is_decoder", "is true, which is not supported")
