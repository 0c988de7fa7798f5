"""Granite 4: Granite's layers, most with a state space (Mamba-2) in place of attention; each MLP may be a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, mixture, state_space
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.mamba import Mamba
from pagoda.arch.models import granite
from pagoda.arch.spec import Experts, ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_MAMBA, _ATTENTION = ("mamba", "linear_attention"), ("attention", "full_attention")
DEFAULT_SHARED, DEFAULT_EXPERTS = 1024, 8


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    shared, count = fields.integer("shared_intermediate_size", DEFAULT_SHARED), _experts(fields)
    spec = granite.of_config("granitemoehybrid", {**config, "intermediate_size": shared})
    spec = decoder.without_rope(spec, [fields.get("position_embedding_type") != "rope"] * len(spec.layers))
    if count:
        # as in Granite 3: a softmax over the experts that are chosen
        experts = Experts(count, fields.integer("num_experts_per_tok"), True, shared, shared_gate=False)
        spec = mixture.with_mixtures(spec, fields.integer("intermediate_size"), experts)
    spaces = _state_spaces(fields, len(spec.layers))
    return state_space.with_state_spaces(spec, _mamba(fields), spaces) if any(spaces) else spec


def _experts(fields: Fields) -> int:
    return fields.integer("num_local_experts", DEFAULT_EXPERTS, least=0)


def _state_spaces(fields: Fields, count: int) -> list[bool]:
    """Which layers have one."""
    kinds = fields.get("layer_types") or fields.get("layers_block_type")
    if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= {*_MAMBA, *_ATTENTION}:
        raise fields.error("layer_types", f"is {kinds!r}, must hold mamba or attention for each layer")
    if not set(kinds) & set(_ATTENTION):
        raise fields.error("layer_types", "has no attention: a model of state spaces alone is not supported")
    return [kind in _MAMBA for kind in kinds]


def _mamba(fields: Fields) -> Mamba:
    if fields.flag("mamba_proj_bias", False):
        raise fields.error("mamba_proj_bias", "is true, which is not supported")
    state_space.refuse_limits(fields)
    heads, inner = (
        fields.integer("mamba_n_heads", 128),
        fields.integer("mamba_expand", 2) * fields.integer("hidden_size"),
    )
    if inner % heads or fields.get("mamba_d_head") not in (None, "auto", inner // heads):
        raise fields.error("mamba_d_head", f"is {fields.get('mamba_d_head')!r}; {heads} heads make {inner} of no such")
    d = Mamba(
        key_heads=fields.integer("mamba_n_groups", 1),
        value_heads=heads,
        key_dim=fields.integer("mamba_d_state", 256),
        value_dim=inner // heads,
        kernel=state_space.kernel(fields, "mamba_d_conv"),
        eps=fields.number("rms_norm_eps", 1e-6),
        conv_bias=fields.flag("mamba_conv_bias", True),
    )
    return state_space.checked(d, fields, "mamba_n_heads")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    prefix = "granitehybrid."
    fields = Fields(metadata, "GGUF metadata", prefix)
    count = fields.integer("block_count", most=MOST_LAYERS)
    spaces = [f"blk.{i}.ssm_in.weight" in tensors for i in range(count)]
    table = state_space.with_heads_of_attention(metadata, prefix)
    up = tensors.get("blk.0.ffn_up.weight")
    if up is not None:  # another number may stand there, that of experts which there are none of
        table[f"{prefix}feed_forward_length"] = up.shape[0]
    if not table[f"{prefix}attention.head_count_kv"]:
        raise ModelError("a model of state spaces alone is not supported", remedy="Take another model")
    spec = granite.of_gguf("granitemoehybrid", table, tensors, prefix="granitehybrid")
    # converters say by this that nothing turns
    spec = decoder.without_rope(spec, [not fields.flag("rope.scaling.finetuned", True)] * count)
    experts = Fields({**table, f"{prefix}expert_weights_norm": True}, fields.where, prefix)
    spec = mixture.grouped_from_gguf(spec, experts, tensors)
    eps = fields.number("attention.layer_norm_rms_epsilon")
    return state_space.with_state_spaces(spec, state_space.from_gguf(fields, tensors, eps), spaces)
