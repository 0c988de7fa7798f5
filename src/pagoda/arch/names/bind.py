"""What checkpoints call the slots of a spec, in both spellings, and the proof that a checkpoint fills them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from pagoda.arch.names.deepseek import FAMILIES as DEEPSEEKS
from pagoda.arch.names.deepseek import deepseek_tensors
from pagoda.arch.names.delta import delta_slot_name, delta_tensors
from pagoda.arch.names.encoders import FAMILIES as ENCODERS
from pagoda.arch.names.encoders import encoder_name
from pagoda.arch.names.fused import cut_tensors
from pagoda.arch.names.gemma import gemma_tensors
from pagoda.arch.names.gemma4 import GEMMA4, GGUF_GEMMA4, gemma4_tensors
from pagoda.arch.names.gpt2 import gpt2_tensors
from pagoda.arch.names.gpt_oss import gpt_oss_tensors
from pagoda.arch.names.lfm2 import lfm2_tensors
from pagoda.arch.names.mamba import FAMILIES as MAMBAS
from pagoda.arch.names.mamba import mamba_tensors
from pagoda.arch.names.nemotron_h import nemotron_h_tensors
from pagoda.arch.names.pooled import plain_tensors, projection_name, unused
from pagoda.arch.names.renamed import FAMILIES as RENAMED
from pagoda.arch.names.renamed import renamed_tensors
from pagoda.arch.names.visual import apart_experts, encoder_slot_name, from_mmproj, hub_tensors, language_tensors
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.grouped import Stacked
from pagoda.weights.source import Tensor

# slot part: (name in safetensors, name in GGUF), both without layer prefix and `.weight` or `.bias`
_MODEL_NAMES = {
    "embed": ("model.embed_tokens", "token_embd"),
    "positions": ("model.embed_positions", "position_embd"),
    "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
    "score": ("score", "cls.output"),
    "layer_embed": ("model.embed_tokens_per_layer", "per_layer_token_embd"),
    "layer_project": ("model.per_layer_model_projection", "per_layer_model_proj"),
    "layer_project_norm": ("model.per_layer_projection_norm", "per_layer_proj_norm"),
}
_LAYER_NAMES = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "q_gate": ("self_attn.q_gate", "attn_q_gate"),
    "q_a": ("self_attn.q_a_proj", "attn_q_a"),
    "q_a_norm": ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    "q_b": ("self_attn.q_b_proj", "attn_q_b"),
    "kv_a": ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    "kv_a_norm": ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    "k_b": ("self_attn.k_b_proj", "attn_k_b"),
    "v_b": ("self_attn.v_b_proj", "attn_v_b"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "attn_post_norm": ("post_attention_layernorm", "post_attention_norm"),
    "sinks": ("self_attn.sinks", "attn_sinks"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "mlp_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
    "router": ("mlp.gate", "ffn_gate_inp"),
    # `*`: one tensor for each expert
    "gate_experts": ("mlp.experts.*.gate_proj", "ffn_gate_exps"),
    "up_experts": ("mlp.experts.*.up_proj", "ffn_up_exps"),
    "down_experts": ("mlp.experts.*.down_proj", "ffn_down_exps"),
    "gate_shared": ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    "up_shared": ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    "down_shared": ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    "router_shared": ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    "router_choice": ("mlp.gate.e_score_correction", "exp_probs_b"),
    "router_norm": ("router.norm", "ffn_gate_inp_norm"),
    "router_scale": ("router.expert_scale", "ffn_down_exps_scale"),
    "experts_norm": ("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
    "experts_post_norm": ("post_feedforward_layernorm_2", "post_ffw_norm_2"),
    "shared_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "shared_post_norm": ("post_feedforward_layernorm_1", "post_ffw_norm_1"),
    "own_gate": ("per_layer_input_gate", "inp_gate"),
    "own_out": ("per_layer_projection", "proj"),
    "own_post_norm": ("post_per_layer_input_norm", "post_norm"),
    "scale": ("layer_scalar", "layer_output_scale"),
}
_MIXTRAL = MappingProxyType(
    {
        "router": "block_sparse_moe.gate",
        "gate_experts": "block_sparse_moe.experts.*.w1",
        "up_experts": "block_sparse_moe.experts.*.w3",
        "down_experts": "block_sparse_moe.experts.*.w2",
    }
)
_SHARED_EXPERTS = MappingProxyType({f"{p}_shared": f"mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")})
_HUNYUAN = MappingProxyType(
    {
        "q_norm": "self_attn.query_layernorm",
        "k_norm": "self_attn.key_layernorm",
        "router": "mlp.gate.wg",
        **{f"{p}_shared": f"mlp.shared_mlp.{p}_proj" for p in ("gate", "up", "down")},
    }
)
_GRANITE_EXPERTS = MappingProxyType({"router": "block_sparse_moe.router.layer"})
_FOUR_NORMS = MappingProxyType(
    {
        "attn_post_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_mlp_layernorm",
    }
)
# the names in safetensors of families that have their own
_FAMILIES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "mixtral": _MIXTRAL,
        "minimax_m2": {**_MIXTRAL, "router_choice": "block_sparse_moe.e_score_correction"},
        **dict.fromkeys(("glm4", "hyperclovax"), _FOUR_NORMS),
        "hunyuan_v1_dense": _HUNYUAN,
        "hunyuan_v1_moe": _HUNYUAN,
        "granitemoehybrid": {"router": "block_sparse_moe.router.layer", "down": "shared_mlp.output_linear"},
        "phi": {
            "norm": "model.final_layernorm",
            "o": "self_attn.dense",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
        "gemma2": {"mlp_norm": "pre_feedforward_layernorm"},
        "gemma3": {"mlp_norm": "pre_feedforward_layernorm"},
        "gemma4": GEMMA4,
        **dict.fromkeys(
            (
                *("glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3", "dots1", "solar_open"),
                *("bailing_moe", "deepseek", "hy_v3", "mistral4"),
            ),
            _SHARED_EXPERTS,
        ),
        "ernie4_5_moe": {**_SHARED_EXPERTS, "router_choice": "mlp.moe_statics.e_score_correction"},
        "exaone_moe": {**_SHARED_EXPERTS, "router_choice": "mlp.e_score_correction"},
        "granitemoe": _GRANITE_EXPERTS,
        "granitemoeshared": {
            **_GRANITE_EXPERTS,
            "gate_shared": "mlp.gate_proj",
            "up_shared": "mlp.up_proj",
            "down_shared": "shared_mlp.output_linear",
        },
        "starcoder2": {"up": "mlp.c_fc", "down": "mlp.c_proj"},
    }
)
_GGUF_FAMILIES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"gemma4": GGUF_GEMMA4, **{family: {"mlp_norm": "post_attention_norm"} for family in ("seed_oss", "glm4_moe")}}
)
# buffers that old exporters stored; the spec holds their meaning
_HARMLESS = re.compile(
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope_(freqs|factors_long|factors_short)\.weight"
)
_NAMES_SHOWN = 5


def checkpoint_name(slot: str, *, gguf: bool, family: str = "") -> str:
    """The name of the tensor that fills `slot`, such as `model.layers.0.self_attn.q_proj.weight`."""
    prefix, _, part = slot.rpartition(".")
    stem = part.removesuffix("_bias")
    suffix = "bias" if part.endswith("_bias") else "weight"
    own = (_GGUF_FAMILIES if gguf else _FAMILIES).get(family, {}).get(stem)
    if not prefix:
        return f"{own or _MODEL_NAMES[stem][gguf]}.{suffix}"
    layer = prefix.removeprefix("layers.")
    return f"{'blk' if gguf else 'model.layers'}.{layer}.{own or _LAYER_NAMES[stem][gguf]}.{suffix}"


def slot_name(spec: ModelSpec, slot: str, *, gguf: bool = False) -> str:
    """The name of the tensor that fills a slot of this model; `*` stands for the experts of a layer."""
    if spec.vision is not None and slot.startswith("vision."):
        return encoder_slot_name(slot, spec.vision)
    if slot.startswith("project."):
        return projection_name(spec, slot)
    if spec.model_type in ENCODERS:
        return encoder_name(spec, slot, gguf=gguf)
    part = slot.rpartition(".")[2]
    if slot.startswith("layers.") and (delta := spec.layers[int(slot.split(".")[1])].delta) is not None:
        if part in delta.slots(spec.hidden_size):
            return delta_slot_name(slot, gguf=gguf)
    return checkpoint_name(slot, gguf=gguf, family=spec.model_type)


def plainly_named(spec: ModelSpec, tensors: Mapping[str, Tensor], *, gguf: bool) -> Mapping[str, Tensor]:
    """The tensors under the one spelling that the slots are looked up by."""
    if spec.vision is not None:
        tensors = from_mmproj(tensors, spec.vision) if gguf else hub_tensors(tensors, spec.vision)
    elif not gguf and spec.model_type in ("exaone4_5", "gemma3", "gemma4", "mistral3", "mistral4"):
        tensors = language_tensors(tensors)
    if spec.model_type == "gpt2":
        tensors = gpt2_tensors(tensors, gguf=gguf)
    if spec.model_type in RENAMED and not gguf:
        tensors = renamed_tensors(spec, tensors)
    if spec.model_type == "gpt_oss":
        tensors = gpt_oss_tensors(tensors)
    if spec.model_type in DEEPSEEKS:
        tensors = deepseek_tensors(spec, tensors)
    if spec.model_type.startswith("lfm2"):
        tensors = lfm2_tensors(spec, tensors, gguf=gguf)
    elif spec.model_type in MAMBAS:
        if spec.model_type == "nemotron_h":
            tensors = nemotron_h_tensors(spec, tensors, gguf=gguf)
        tensors = mamba_tensors(spec, tensors)
    elif spec.recurrent:
        tensors = delta_tensors(spec, tensors, gguf=gguf)
    if spec.pooling is not None:
        tensors = plain_tensors(spec, tensors)
    if spec.model_type == "gemma4":
        tensors = gemma4_tensors(spec, tensors)
    elif (spec.model_type.startswith("gemma") or spec.model_type == "nemotron") and not gguf:
        tensors = gemma_tensors(tensors)
    tensors = apart_experts(tensors) if spec.model_type == "qwen3_vl_moe" else tensors
    return tensors if spec.model_type in ENCODERS else cut_tensors(spec, tensors)


def bind_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor], *, gguf: bool) -> dict[str, Tensor]:
    """The tensor of every slot. Raises ModelError for one that is missing, has another shape, or is left over."""
    tensors = plainly_named(spec, tensors, gguf=gguf)
    tensors = with_stacked_experts(spec, tensors, gguf=gguf)
    names = {slot: slot_name(spec, slot, gguf=gguf) for slot in spec.slots()}
    head = checkpoint_name("head", gguf=gguf, family=spec.model_type)
    left_over = {name for name in tensors if not _HARMLESS.fullmatch(name)}
    if spec.tied:
        if names["embed"] not in tensors:
            names["embed"] = head
        left_over.discard(head)
    bound: dict[str, Tensor] = {}
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise _missing(missing, head)
    for slot, shape in spec.slots().items():
        tensor = tensors[names[slot]]
        if slot == "vision.patch" and math.prod(tensor.shape) == math.prod(shape):
            tensor = Tensor(
                tensor.name, shape, tensor.type, tensor.data
            )  # stored as the convolution that this product is
        if tensor.shape == (1, *shape):  # a gate for one output
            tensor = replace(tensor, shape=shape)
        if tensor.shape != shape:
            raise ModelError(f"tensor {tensor.name} has shape {tensor.shape}, but the configuration asks for {shape}")
        bound[slot] = tensor
    left_over -= set(names.values())
    if spec.pooling is not None:
        left_over = {name for name in left_over if not unused(name)}
    if left_over:
        raise ModelError(f"the checkpoint holds tensors that a {spec.model_type} model lacks: {_some(left_over)}")
    return bound


def with_stacked_experts(spec: ModelSpec, tensors: Mapping[str, Tensor], *, gguf: bool) -> Mapping[str, Tensor]:
    """The tensors with those of the experts of a layer as one, under the name with the `*`, if they are not already.

    GGUF files of early Mixtral models have one for each expert too: `blk.0.ffn_gate.7.weight`.
    """
    out = dict(tensors)
    for slot, shape in spec.slots().items():
        if not slot.endswith("_experts"):
            continue
        name = slot_name(spec, slot, gguf=gguf)
        if name in out:
            continue
        each = name.replace("_exps.", ".*.") if gguf else name
        parts = [each.replace("*", str(expert)) for expert in range(shape[0])]
        if missing := [part for part in parts if part not in out]:
            raise _missing([name] if gguf and len(missing) == len(parts) else missing, "")
        experts = tuple(out.pop(part) for part in parts)
        if len({(expert.type, expert.shape) for expert in experts}) > 1:
            raise ModelError(f"the experts {name} are not all stored alike", remedy="Take another version of the model")
        out[name] = Stacked(experts).tensor(name)
    return out


def _missing(missing: list[str], head: str) -> ModelError:
    tie = 'If the head is the embedding itself, set "tie_word_embeddings": true in config.json'
    return ModelError(
        f"the checkpoint lacks {len(missing)} tensors that the model needs: {_some(missing)}",
        remedy=tie if missing == [head] else "The download may be incomplete: fetch the model again",
    )


def _some(names: set[str] | list[str]) -> str:
    shown = sorted(names)[:_NAMES_SHOWN]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
