"""What the architectures with experts share: the fields of both formats to the MLP of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import Experts, Mlp, ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_SOFTMAX, _SIGMOID = 1, 2  # of GGUF
_OLD_GROUPS = MappingProxyType({160: (8, 3), 256: (8, 4)})
"""Groups of DeepSeek-V2's and V3's experts, and how many take part, which GGUF files did not always say."""


def with_mixtures(spec: ModelSpec, size: int, experts: Experts, sparse: Sequence[bool] | None = None) -> ModelSpec:
    """The spec with experts of this size in all its layers, or in those that `sparse` says."""
    if experts.active > experts.count:
        raise ModelError(f"a token cannot go through {experts.active} of {experts.count} experts")
    mlp, chosen = Mlp(size, experts=experts), sparse or [True] * len(spec.layers)
    layers = (replace(layer, mlp=mlp) if has else layer for layer, has in zip(spec.layers, chosen, strict=True))
    return replace(spec, layers=tuple(layers))


def with_experts(spec: ModelSpec, change: Callable[[Experts], Experts]) -> ModelSpec:
    """The spec with the experts of its layers changed."""
    layers = []
    for layer in spec.layers:
        experts = None if layer.mlp.experts is None else change(layer.mlp.experts)
        layers.append(replace(layer, mlp=replace(layer.mlp, experts=experts)))
    return replace(spec, layers=tuple(layers))


def from_config(spec: ModelSpec, fields: Fields, shared: int = 0) -> ModelSpec:
    """As Qwen's configs say it: some layers may have no experts. `shared`: the size of the shared one."""
    # newer transformers write it under the second name
    name = "num_local_experts" if fields.get("num_experts") is None else "num_experts"
    count, every = fields.integer(name, least=0), fields.integer("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers") or []
    if count == 0:
        return spec
    active, normalized = fields.integer("num_experts_per_tok"), fields.flag("norm_topk_prob", False)
    sparse = [(i + 1) % every == 0 and i not in dense for i in range(len(spec.layers))]
    experts = Experts(count, active, normalized, shared)
    return with_mixtures(spec, fields.integer("moe_intermediate_size"), experts, sparse)


def from_gguf(
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    normalized: bool,
    qk_norm: bool = False,
) -> ModelSpec:
    """Of layers that all have experts. The widths are those of the tensors: not every converter writes them."""
    fields = Fields(metadata, "GGUF metadata", f"{architecture}.")
    gate, shared = (tensors.get(f"blk.0.ffn_gate_{kind}.weight") for kind in ("exps", "shexp"))
    size = fields.integer("expert_feed_forward_length", gate.shape[1] if gate and len(gate.shape) == 3 else None)
    table = {f"{architecture}.feed_forward_length": size, **metadata}
    spec = decoder.from_gguf(architecture, table, tensors, qk_norm=qk_norm)
    count, active = fields.integer("expert_count"), fields.integer("expert_used_count")
    return with_mixtures(spec, size, Experts(count, active, normalized, shared.shape[0] if shared else 0))


def grouped_from_config(spec: ModelSpec, fields: Fields, *, sigmoid: bool) -> ModelSpec:
    """As DeepSeek's configs say it: experts behind the first few layers. A sigmoid router has a bias for its choice."""
    if fields.get("n_routed_experts") is None:
        return spec
    size, first = fields.integer("moe_intermediate_size"), fields.integer("first_k_dense_replace", 0, least=0)
    every, known = fields.integer("moe_layer_freq", 1), ("dense", "sparse")
    usual = [known[i >= first and i % every == 0] for i in range(len(spec.layers))]
    sparse = [kind == known[True] for kind in fields.words("mlp_layer_types", known, usual)]
    experts = Experts(
        count=fields.integer("n_routed_experts"),
        active=fields.integer("num_experts_per_tok"),
        normalized=fields.flag("norm_topk_prob", False),
        shared=fields.integer("n_shared_experts", 0, least=0) * size,
        shared_gate=False,
        sigmoid=sigmoid,
        scale=fields.number("routed_scaling_factor", 1.0),
        choice_bias=sigmoid,
        groups=fields.integer("n_group", 1),
        active_groups=fields.integer("topk_group", 1),
        group_best=2 if sigmoid else 1,
    )
    return with_mixtures(spec, size, checked(experts, fields), sparse)


def grouped_from_gguf(spec: ModelSpec, fields: Fields, tensors: Mapping[str, Tensor]) -> ModelSpec:
    """Which layers have experts, and what beside them, is what their tensors say."""
    sparse = [f"blk.{i}.ffn_gate_inp.weight" in tensors for i in range(len(spec.layers))]
    if not any(sparse):
        return spec
    prefix = f"blk.{sparse.index(True)}."
    gate, both, shared = (tensors.get(f"{prefix}ffn_gate_{kind}.weight") for kind in ("exps", "up_exps", "shexp"))
    sizes = [t.shape[1] // parts for t, parts in ((gate, 1), (both, 2)) if t and len(t.shape) == 3]
    size = fields.integer("expert_feed_forward_length", sizes[0] if sizes else None)
    choice_bias = any(f"{prefix}exp_probs_b{end}" in tensors for end in (".bias", ""))
    kind = fields.integer("expert_gating_func", 0, least=0) or (_SIGMOID if choice_bias else _SOFTMAX)
    if kind not in (_SOFTMAX, _SIGMOID):
        raise fields.error("expert_gating_func", f"is {kind}; supported: 1 (softmax), 2 (sigmoid)")
    count = fields.integer("expert_count")
    of_deepseek = fields.prefix == "deepseek2."
    groups, active_groups = _OLD_GROUPS.get(count, (1, 1)) if of_deepseek else (1, 1)
    experts = Experts(
        count=count,
        active=fields.integer("expert_used_count"),
        normalized=fields.flag("expert_weights_norm", False),
        shared=shared.shape[0] if shared else 0,
        shared_gate=False,
        sigmoid=kind == _SIGMOID,
        scale=fields.number("expert_weights_scale", 1.0) if fields.get("expert_weights_scale") else 1.0,
        choice_bias=choice_bias,
        groups=fields.integer("expert_group_count", groups),
        active_groups=fields.integer("expert_group_used_count", active_groups),
        group_best=2 if kind == _SIGMOID else 1,
    )
    return with_mixtures(spec, size, checked(experts, fields), sparse)


def checked(e: Experts, fields: Fields) -> Experts:
    each = e.count // e.groups
    if e.groups * each != e.count or e.active_groups > e.groups or e.active > e.active_groups * each:
        raise ModelError(
            f"{fields.where}: {e.active} of {e.count} experts cannot come from {e.active_groups} of {e.groups} groups"
        )
    return replace(e, group_best=min(e.group_best, each))
