"""Nemotron-H and Nemotron 3 Nano: blocks that are a state space, attention, an MLP or a mixture, all of squares without
a gate; a block of one of the first two kinds and the MLP behind it, if there is one, are a layer here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch import decoder, mixture, state_space
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.mamba import Mamba
from pagoda.arch.spec import Experts, Mlp, ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(gated=False, activation="relu2")
_KINDS = MappingProxyType(
    {
        **dict.fromkeys(("M", "mamba", "linear_attention"), "M"),
        **dict.fromkeys(("*", "attention", "full_attention"), "*"),
        **dict.fromkeys(("-", "mlp"), "-"),
        **dict.fromkeys(("E", "moe"), "E"),
    }
)
_EPSILONS = ("layer_norm_epsilon", "rms_norm_eps", "norm_eps")
_REFUSED = ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "moe_latent_size", "sliding_window")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    for name in _REFUSED:
        if fields.get(name):
            raise fields.error(name, f"is {fields.get(name)!r}, which is not supported")
    state_space.refuse_limits(fields)
    for name in ("mlp_hidden_act", "mamba_hidden_act"):
        if fields.get(name) not in (None, "relu2" if name[1] == "l" else "silu"):
            raise fields.error(name, f"is {fields.get(name)!r}, which is not supported")
    layers = _layers(_blocks(fields), fields, "layers_block_type")
    named = next((name for name in _EPSILONS if fields.get(name) is not None), _EPSILONS[0])
    size = fields.get("head_dim") or fields.get("attention_head_dim") or 128
    table = {**config, "num_hidden_layers": len(layers), "hidden_act": "relu2", "head_dim": size}
    spec = decoder.from_config("nemotron_h", Fields(table, fields.where), _PARTS, norm_eps=named)
    mlps = {"": Mlp(0, "relu2", gated=False), "-": spec.layers[0].mlp}
    if any(layer.endswith("E") for layer in layers):
        mlps["E"] = _mixture(fields)
    return _with_blocks(spec, layers, mlps, _mamba(fields, spec.norm_eps))


def _blocks(fields: Fields) -> str:
    """The kind of each block, a letter for each."""
    said = fields.get("layers_block_type") or fields.get("layer_types") or fields.get("hybrid_override_pattern")
    if not isinstance(said, list | str) or not said or not {*said} <= {*_KINDS}:
        raise fields.error("layers_block_type", f"is {said!r}, must hold mamba, attention, mlp or moe for each block")
    return "".join(_KINDS[kind] for kind in said)


def _layers(blocks: str, fields: Fields, name: str) -> list[str]:
    layers = re.findall(r"[M*][-E]?", blocks)
    if "".join(layers) != blocks or not {"M", "*"} <= {*blocks}:
        raise fields.error(
            name,
            f"is {blocks!r}: models whose MLPs do not each follow a mixer, or of mixers of one kind, are not supported",
        )
    return layers


def _mamba(fields: Fields, eps: float) -> Mamba:
    d = Mamba(
        key_heads=fields.integer("n_groups", 8),
        value_heads=fields.integer("mamba_num_heads", 128),
        key_dim=fields.integer("ssm_state_size", 128),
        value_dim=fields.integer("mamba_head_dim", 64),
        kernel=state_space.kernel(fields, "conv_kernel"),
        eps=eps,
        conv_bias=fields.flag("use_conv_bias", True),
    )
    return state_space.checked(d, fields, "mamba_num_heads")


def _mixture(fields: Fields) -> Mlp:
    experts = Experts(
        count=fields.integer("n_routed_experts"),
        active=fields.integer("num_experts_per_tok"),
        normalized=fields.flag("norm_topk_prob", True),
        shared=fields.integer("moe_shared_expert_intermediate_size"),
        shared_gate=False,
        sigmoid=True,
        scale=fields.number("routed_scaling_factor", 1.0),
        choice_bias=True,
        groups=fields.integer("n_group", 1),
        active_groups=fields.integer("topk_group", 1),
        group_best=2,
    )
    return Mlp(fields.integer("moe_intermediate_size"), "relu2", gated=False, experts=mixture.checked(experts, fields))


def _with_blocks(spec: ModelSpec, layers: Sequence[str], mlps: Mapping[str, Mlp], d: Mamba) -> ModelSpec:
    """The spec, which has as many layers, with a state space and an MLP where the blocks have them; nothing turns."""
    spec = decoder.without_rope(spec, [True] * len(layers))
    chosen = zip(spec.layers, layers, strict=True)
    spec = replace(spec, layers=tuple(replace(layer, mlp=mlps[blocks[1:]]) for layer, blocks in chosen))
    return state_space.with_state_spaces(spec, d, [blocks[0] == "M" for blocks in layers])


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The last block may be one that predicts several tokens at once: it is left out."""
    architecture = metadata["general.architecture"]
    prefix = f"{architecture}."
    fields = Fields(metadata, "GGUF metadata", prefix)
    if fields.get("moe_latent_size"):
        raise fields.error("moe_latent_size", f"is {fields.get('moe_latent_size')!r}, which is not supported")
    count = fields.integer("block_count", most=MOST_LAYERS) - fields.integer("nextn_predict_layers", 0, least=0)
    blocks = "".join(_kind_in_gguf(f"blk.{i}.", tensors) for i in range(count))
    layers = _layers(blocks, fields, "block_count")
    table = state_space.with_heads_of_attention(metadata, prefix)
    dense = tensors.get(f"blk.{blocks.find('-')}.ffn_up.weight")
    eps = fields.get("attention.layer_norm_rms_epsilon") or fields.number("attention.layer_norm_epsilon")
    table |= {
        f"{prefix}block_count": len(layers),
        f"{prefix}feed_forward_length": 1 if dense is None else dense.shape[0],
        f"{prefix}attention.layer_norm_rms_epsilon": eps,
    }
    spec = decoder.from_gguf("nemotron_h", table, tensors, parts=_PARTS, prefix=architecture)
    mlps = {"": Mlp(0, "relu2", gated=False), "-": Mlp(spec.layers[0].mlp.size, "relu2", gated=False)}
    if "E" in blocks:
        mlps["E"] = _mixture_of_gguf(fields, f"blk.{blocks.index('E')}.", tensors)
    return _with_blocks(spec, layers, mlps, state_space.from_gguf(fields, tensors, eps))


def _kind_in_gguf(prefix: str, tensors: Mapping[str, Tensor]) -> str:
    marks = {"ssm_in": "M", "attn_q": "*", "ffn_gate_inp": "E", "ffn_up": "-"}
    kind = next((kind for name, kind in marks.items() if f"{prefix}{name}.weight" in tensors), "")
    if not kind:
        raise ModelError(f"the checkpoint lacks the tensors of block {prefix}", remedy="Fetch the model again")
    return kind


def _mixture_of_gguf(fields: Fields, prefix: str, tensors: Mapping[str, Tensor]) -> Mlp:
    shared = tensors.get(f"{prefix}ffn_up_shexp.weight")
    experts = Experts(
        count=fields.integer("expert_count"),
        active=fields.integer("expert_used_count"),
        normalized=fields.flag("expert_weights_norm", True),
        shared=0 if shared is None else shared.shape[0],
        shared_gate=False,
        sigmoid=True,
        scale=fields.number("expert_weights_scale", 1.0),
        choice_bias=True,
        groups=fields.integer("expert_group_count", 1),
        active_groups=fields.integer("expert_group_used_count", 1),
        group_best=2,
    )
    size = fields.integer("expert_feed_forward_length")
    return Mlp(size, "relu2", gated=False, experts=mixture.checked(experts, fields))
