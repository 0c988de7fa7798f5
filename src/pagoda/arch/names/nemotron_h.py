"""What Nemotron-H's checkpoints call their tensors: of blocks, a mixer or an MLP each, two to a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_BLOCK = re.compile(r"((?:backbone|model)\.layers|blk)\.(\d+)\.((?:norm|mixer|attn|ssm|ffn|exp_probs)[._].+)")
_WHOLE = MappingProxyType(
    {"embeddings.weight": "model.embed_tokens.weight", "norm_f.weight": "model.norm.weight"},
)
# several tokens are predicted at once with these, which no step does
_UNUSED = re.compile(r"mtp\..*")
_OF_ATTENTION = re.compile(r"mixer\.[qkvo]_proj\..*")


def nemotron_h_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor], *, gguf: bool) -> dict[str, Tensor]:
    """The tensors by layer, under the names that other families with state spaces have."""
    places = _places(spec)
    return dict(found for name, tensor in tensors.items() for found in _each(places, name, tensor, gguf))


def _places(spec: ModelSpec) -> list[tuple[int, bool]]:
    """Of each block its layer, and whether it is the MLP there."""
    return [(i, mlp) for i, layer in enumerate(spec.layers) for mlp in (False, True) if not mlp or layer.mlp.size]


def _each(places: list[tuple[int, bool]], name: str, tensor: Tensor, gguf: bool) -> Iterator[tuple[str, Tensor]]:
    found = _BLOCK.fullmatch(name)
    if _UNUSED.fullmatch(name) or (gguf and found and int(found[2]) >= len(places)):
        return
    if found is None or int(found[2]) >= len(places):
        yield _WHOLE.get(name.removeprefix("backbone.").removeprefix("model."), name), tensor
        return
    layer, mlp = places[int(found[2])]
    rest = _in_gguf(found[3], mlp) if gguf else _in_hub(found[3], mlp)
    yield f"{'blk' if gguf else 'model.layers'}.{layer}.{rest}", tensor


def _in_gguf(rest: str, mlp: bool) -> str:
    return rest.replace("attn_norm.", "ffn_norm.") if mlp else rest


def _in_hub(rest: str, mlp: bool) -> str:
    if rest == "norm.weight":
        return "post_attention_layernorm.weight" if mlp else "input_layernorm.weight"
    if mlp:
        rest = rest.replace("mixer.", "mlp.").replace("e_score_correction_bias", "e_score_correction.bias")
        if re.fullmatch(r"mlp\.experts\.(up|down)_proj", rest):  # all experts in one, as newer transformers write them
            rest = f"{rest.replace('experts.', 'experts.*.')}.weight"
        return rest.replace("shared_experts.", "shared_expert.")
    own = "self_attn." if _OF_ATTENTION.fullmatch(rest) else "mamba."
    return rest.replace("mixer.", own)
