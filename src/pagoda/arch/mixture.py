"""What the architectures with experts share: the fields of both formats to the MLP of a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import Experts, Mlp, ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor


def with_mixtures(spec: ModelSpec, size: int, experts: Experts, sparse: Sequence[bool] | None = None) -> ModelSpec:
    """The spec with experts of this size in all its layers, or in those that `sparse` says."""
    if experts.active > experts.count:
        raise ModelError(f"a token cannot go through {experts.active} of {experts.count} experts")
    mlp, chosen = Mlp(size, experts=experts), sparse or [True] * len(spec.layers)
    layers = (replace(layer, mlp=mlp) if has else layer for layer, has in zip(spec.layers, chosen, strict=True))
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
