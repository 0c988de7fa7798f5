"""What Qwen's hybrids share: a gated delta net in most layers, gated attention in the others, of both formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder, mixture, visual
from pagoda.arch.delta import DeltaNet
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(qk_norm=True)
_INTERVAL = 4
_ROTATED = 0.25
_OF_PICTURES = ("mrope_section", "mrope_interleaved")
_SECTIONS = (11, 11, 10)


def text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model, which of models that see are in `text_config`, with the family's defaults.

    Text has one position for each token: how a picture's tokens turn is left out where there is no encoder.
    """
    inner = config.get("text_config")
    found = dict(inner) if isinstance(inner, Mapping) else dict(config)
    for name in ("eos_token_id", "bos_token_id", "tie_word_embeddings"):
        if config.get(name) is not None:
            found[name] = config[name]
    recipe = found.get("rope_parameters") or found.get("rope_scaling")
    if isinstance(recipe, Mapping):
        text = {name: value for name, value in recipe.items() if name not in _OF_PICTURES}
        turned = {"mrope_section": recipe.get("mrope_section") or _SECTIONS, "mrope_interleaved": True}
        found["rope_parameters"] = {**text, **turned} if visual.sees(config) else text
    if found.get("partial_rotary_factor") is None:
        found["partial_rotary_factor"] = _ROTATED
    return found


def from_config(model_type: str, fields: Fields) -> ModelSpec:
    """The spec with the MLP of `intermediate_size` in all layers."""
    if fields.flag("attention_bias", False):
        raise fields.error("attention_bias", "is true, which is not supported for this architecture")
    spec = decoder.from_config(model_type, fields, _PARTS, head_dim=256)
    delta = DeltaNet(
        key_heads=fields.integer("linear_num_key_heads", 16),
        value_heads=fields.integer("linear_num_value_heads", 32),
        key_dim=fields.integer("linear_key_head_dim", 128),
        value_dim=fields.integer("linear_value_head_dim", 128),
        kernel=fields.integer("linear_conv_kernel_dim", 4, least=2, most=16),
    )
    return _with_delta(spec, delta, _kinds(fields, len(spec.layers)), fields)


def _kinds(fields: Fields, count: int) -> list[str]:
    every = fields.integer("full_attention_interval", _INTERVAL)
    known = ("linear_attention", "full_attention")
    return fields.words("layer_types", known, [known[(i + 1) % every == 0] for i in range(count)])


def from_gguf(
    model_type: str,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    tiled: bool,
    experts: bool = False,
) -> ModelSpec:
    """The last blocks may be such as predict several tokens at once: they are left out."""
    fields = Fields(metadata, "GGUF metadata", f"{architecture}.")
    count = fields.integer("block_count", most=MOST_LAYERS) - fields.integer("nextn_predict_layers", 0, least=0)
    table = {**metadata, f"{architecture}.block_count": count}
    if experts:
        spec = mixture.from_gguf(architecture, table, tensors, normalized=True, qk_norm=True)
    else:
        spec = decoder.from_gguf(architecture, table, tensors, qk_norm=True)
    value_heads = fields.integer("ssm.time_step_rank")
    delta = DeltaNet(
        key_heads=fields.integer("ssm.group_count"),
        value_heads=value_heads,
        key_dim=fields.integer("ssm.state_size"),
        value_dim=fields.integer("ssm.inner_size") // value_heads,
        kernel=fields.integer("ssm.conv_kernel", least=2, most=16),
        tiled=tiled,
    )
    return _with_delta(replace(spec, model_type=model_type), delta, _kinds(fields, count), fields)


def _with_delta(spec: ModelSpec, delta: DeltaNet, kinds: list[str], fields: Fields) -> ModelSpec:
    if delta.value_heads % delta.key_heads:
        raise fields.error(
            "linear_num_value_heads", f"is {delta.value_heads}; {delta.key_heads} key heads cannot be shared evenly"
        )
    layers = (
        replace(
            layer,
            attention=replace(layer.attention, out_gate=True),
            delta=delta if kind == "linear_attention" else None,
        )
        for layer, kind in zip(spec.layers, kinds, strict=True)
    )
    return replace(spec, layers=tuple(layers))
