"""Names of their own that checkpoints have for the tensors of known layers: tables to the usual spelling."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from pagoda.arch.spec import Attention, ModelSpec
from pagoda.weights.parts import rows
from pagoda.weights.source import Tensor

_INTERNLM2 = MappingProxyType(
    {
        "model.tok_embeddings.": "model.embed_tokens.",
        "output.": "lm_head.",
        ".attention_norm.": ".input_layernorm.",
        ".attention.wqkv.": ".self_attn.qkv_by_group.",
        ".attention.wo.": ".self_attn.o_proj.",
        ".ffn_norm.": ".post_attention_layernorm.",
        ".feed_forward.w1.": ".mlp.gate_proj.",
        ".feed_forward.w3.": ".mlp.up_proj.",
        ".feed_forward.w2.": ".mlp.down_proj.",
    }
)
_BAILING = MappingProxyType(
    {
        "model.word_embeddings.": "model.embed_tokens.",
        ".attention.query_key_value.": ".self_attn.qkv_proj.",
        ".attention.dense.": ".self_attn.o_proj.",
        ".attention.query_layernorm.": ".self_attn.q_norm.",
        ".attention.key_layernorm.": ".self_attn.k_norm.",
        ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction.bias",
    }
)
_EXAONE = MappingProxyType(
    {
        "transformer.wte.": "model.embed_tokens.",
        "transformer.ln_f.": "model.norm.",
        "transformer.h.": "model.layers.",
        ".ln_1.": ".input_layernorm.",
        ".ln_2.": ".post_attention_layernorm.",
        ".attn.attention.out_proj.": ".self_attn.o_proj.",
        ".attn.attention.": ".self_attn.",
        ".mlp.c_fc_0.": ".mlp.gate_proj.",
        ".mlp.c_fc_1.": ".mlp.up_proj.",
        ".mlp.c_proj.": ".mlp.down_proj.",
    }
)
_FALCON = MappingProxyType(
    {
        "transformer.word_embeddings.": "model.embed_tokens.",
        "transformer.ln_f.": "model.norm.",
        "transformer.h.": "model.layers.",
        ".ln_attn.": ".input_layernorm.",
        ".ln_mlp.": ".post_attention_layernorm.",
        ".self_attention.query_key_value.": ".self_attn.qkv_by_group.",
        ".self_attention.dense.": ".self_attn.o_proj.",
        ".mlp.dense_h_to_4h.": ".mlp.up_proj.",
        ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
    }
)
_GPT_NEOX = MappingProxyType(
    {
        "gpt_neox.embed_in.": "model.embed_tokens.",
        "gpt_neox.final_layer_norm.": "model.norm.",
        "gpt_neox.layers.": "model.layers.",
        "embed_out.": "lm_head.",
        ".attention.query_key_value.": ".self_attn.qkv_by_group.",
        ".attention.dense.": ".self_attn.o_proj.",
        ".mlp.dense_h_to_4h.": ".mlp.up_proj.",
        ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
    }
)
# published with the names on the left, and written by newer transformers with others
_HY_V3 = MappingProxyType(
    {
        ".mlp.router.gate.": ".mlp.gate.",
        ".mlp.shared_mlp.": ".mlp.shared_experts.",
        ".mlp.expert_bias": ".mlp.gate.e_score_correction.bias",
        ".mlp.e_score_correction_bias": ".mlp.gate.e_score_correction.bias",
    }
)
# behind eyes or not; the experts of a layer as one, without a suffix
_MISTRAL4 = MappingProxyType(
    {
        "language_model.model.": "model.",
        "model.language_model.": "model.",
        "language_model.lm_head.": "lm_head.",
        ".mlp.experts.gate_up_proj": ".mlp.experts.*.gate_up_proj.weight",
        ".mlp.experts.down_proj": ".mlp.experts.*.down_proj.weight",
    }
)
FAMILIES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "bailing_moe": _BAILING,
        "exaone": _EXAONE,
        "falcon": _FALCON,
        "gpt_neox": _GPT_NEOX,
        "granite_swa": MappingProxyType({".self_attn.sinks": ".self_attn.sinks.weight"}),
        "hy_v3": _HY_V3,
        "internlm2": _INTERNLM2,
        "hyperclovax": MappingProxyType(
            {".post_norm1.": ".post_self_attn_layernorm.", ".post_norm2.": ".post_mlp_layernorm."}
        ),
        "mistral4": _MISTRAL4,
    }
)
_BUFFERS = re.compile(r"(model\.layers\.\d+\.attention|model\.layers\.\d+\.attn\.attention)\.(masked_)?bias")
"""Which tokens see which, as old exporters stored it."""
_BY_GROUP = re.compile(r"model\.layers\.(\d+)\.self_attn\.(qkv_by_group)\.(weight|bias)")


def renamed_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a family of the table under the spelling of other decoders."""
    table = FAMILIES[spec.model_type]
    return dict(found for name, tensor in tensors.items() for found in _each(spec, _plain(table, name), tensor))


def _plain(table: Mapping[str, str], name: str) -> str:
    for own, usual in table.items():
        # what begins with no dot is the beginning of the whole
        found = own in name if own.startswith(".") else name.startswith(own)
        if found and not (own in usual and usual in name):
            name = name.replace(own, usual, 1)
    return name


def _each(spec: ModelSpec, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if _BUFFERS.fullmatch(name):
        return
    found = _BY_GROUP.fullmatch(name)
    if found is None or int(found[1]) >= len(spec.layers):
        yield name, tensor
        return
    yield from _by_group(name, spec.layers[int(found[1])].attention, tensor)


def _by_group(name: str, a: Attention, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """q, k and v of one matrix that has, for each KV head, its queries, its key and its value."""
    shared = a.heads // a.kv_heads
    if tensor.shape[0] != a.kv_heads * (shared + 2) * a.head_dim:
        yield name, tensor  # left for the complaint about it
        return
    places = np.arange(tensor.shape[0], dtype=np.intp).reshape(a.kv_heads, shared + 2, a.head_dim)
    ends = (0, shared, shared + 1, shared + 2)
    for letter, first, last in zip("qkv", ends, ends[1:], strict=False):
        yield name.replace("qkv_by_group", f"{letter}_proj"), rows(tensor, places[:, first:last].reshape(-1))
