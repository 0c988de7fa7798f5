"""What the architectures with latent attention share: the fields of both formats to a ModelSpec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder, mixture, rope
from pagoda.arch.fields import Fields
from pagoda.arch.latent import Latent
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_INNER_EPS = 1e-6
"""Of the norms inside, whatever a file says of the others."""


def from_config(model_type: str, fields: Fields, *, interleaved: bool = True) -> ModelSpec:
    """The spec with the MLP of `intermediate_size` in all layers."""
    if fields.flag("attention_bias", False):
        raise fields.error("attention_bias", "is true, which is not supported for this architecture")
    turned = fields.integer("qk_rope_head_dim")
    table = {**fields.values, "head_dim": turned, "num_key_value_heads": fields.get("num_attention_heads")}
    spec = decoder.from_config(model_type, Fields(table, fields.where), decoder.Parts(interleaved=interleaved))
    latent = Latent(
        rank=fields.integer("kv_lora_rank"),
        nope=fields.integer("qk_nope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
        q_rank=fields.integer("q_lora_rank", 0),
    )
    recipe = Fields(fields.get("rope_parameters") or fields.get("rope_scaling") or {}, fields.where)
    factor = 1.0
    if recipe.get("mscale_all_dim") and (recipe.get("rope_type") or recipe.get("type")) == "yarn":
        factor = rope.yarn_attention_factor(recipe.number("factor"), recipe.number("mscale_all_dim"))
    return with_latent(spec, latent, turned, factor)


def from_gguf(
    model_type: str,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    interleaved: bool = True,
) -> ModelSpec:
    """The last blocks may be such as predict several tokens at once: they are left out."""
    fields = Fields(metadata, "GGUF metadata", f"{architecture}.")
    count = fields.integer("block_count") - fields.integer("nextn_predict_layers", 0, least=0)
    turned, heads = fields.integer("rope.dimension_count"), fields.integer("attention.head_count")
    # of files that have the matrices of both directions apart, `key_length` is that of what is kept
    size = fields.integer("attention.key_length_mla", fields.integer("attention.key_length"))
    value_dim = fields.integer("attention.value_length_mla", fields.integer("attention.value_length"))
    own = {"block_count": count, "attention.head_count_kv": heads}
    own |= {"attention.key_length": turned, "attention.value_length": turned}
    table = {**metadata, **{f"{architecture}.{name}": value for name, value in own.items()}}
    spec = decoder.from_gguf(model_type, table, tensors, interleaved=interleaved, prefix=architecture)
    latent = Latent(
        rank=fields.integer("attention.kv_lora_rank"),
        nope=size - turned,
        value_dim=value_dim,
        q_rank=fields.integer("attention.q_lora_rank", 0) if "blk.0.attn_q_a.weight" in tensors else 0,
    )
    factor = 1.0
    if fields.get("rope.scaling.type") == "yarn" and fields.get("rope.scaling.yarn_log_multiplier"):
        stretch = math.log(fields.number("rope.scaling.factor"))
        factor += fields.number("rope.scaling.yarn_log_multiplier") * stretch
    return mixture.grouped_from_gguf(with_latent(spec, latent, turned, factor), fields, tensors)


def with_latent(spec: ModelSpec, latent: Latent, turned: int, factor: float) -> ModelSpec:
    """The spec with such an attention in all layers. `factor`: of YaRN, for queries and for keys."""
    layers = (
        replace(
            layer,
            attention=replace(
                layer.attention,
                kv_heads=1,
                head_dim=latent.rank + turned,
                scale=(latent.nope + turned) ** -0.5 * factor**2,
                latent=latent,
            ),
        )
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers), latent_eps=_INNER_EPS)
