"""What checkpoints of models with a gated delta net call their tensors: fused products cut, norms made plain."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from pagoda.arch.delta import DeltaNet
from pagoda.arch.spec import Attention, ModelSpec
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import Bytes, MadeTensor
from pagoda.weights.parts import OUTPUTS, part, rows
from pagoda.weights.source import Tensor

Named = Iterator[tuple[str, Tensor]]
Floats = npt.NDArray[np.float32]

# several tokens are predicted at once with these, which no step does
_UNUSED = re.compile(r"mtp\..*")
_EYES = re.compile(r"(model\.)?visual\..*")
_WRAPPED = re.compile(r"^model\.language_model\.|^language_model\.model\.")
_HUB_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_NORMS = re.compile(r"model\.norm\.weight|.*\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)\.weight")

_HUB_PARTS = MappingProxyType(
    {
        "linear_attn.in_proj_qkvz.weight": "qkvz",
        "linear_attn.in_proj_ba.weight": "ba",
        "linear_attn.in_proj_qkv.weight": "qkv",
        "linear_attn.in_proj_z.weight": "z",
        "linear_attn.in_proj_b.weight": "beta",
        "linear_attn.in_proj_a.weight": "decay",
        "linear_attn.conv1d.weight": "conv",
        "linear_attn.A_log": "rate",
        "linear_attn.dt_bias": "dt",
        "linear_attn.norm.weight": "z_norm",
        "linear_attn.out_proj.weight": "o",
    }
)
_GGUF_PARTS = MappingProxyType(
    {
        "ssm_in.weight": "qkvz",
        "ssm_ba.weight": "ba",
        "attn_qkv.weight": "qkv",
        "attn_gate.weight": "z",
        "ssm_beta.weight": "beta",
        "ssm_alpha.weight": "decay",
        "ssm_conv1d.weight": "conv",
        "ssm_a": "rate",
        "ssm_dt.bias": "dt",
        "ssm_norm.weight": "z_norm",
        "ssm_out.weight": "o",
    }
)


def delta_slot_name(slot: str, *, gguf: bool) -> str:
    """The name that `delta_tensors` gives what fills a slot of a delta net, such as `model.layers.0.linear_attn.q`."""
    _, layer, part_name = slot.split(".")
    return f"{'blk' if gguf else 'model.layers'}.{layer}.linear_attn.{part_name}"


def delta_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor], *, gguf: bool) -> dict[str, Tensor]:
    """The tensors of the model with one for each slot; names that are not of the family stay as they are."""
    each = _from_gguf if gguf else _from_hub
    return dict(found for name, tensor in tensors.items() for found in each(spec, name, tensor))


def _from_hub(spec: ModelSpec, name: str, tensor: Tensor) -> Named:
    name = _WRAPPED.sub("model.", name)
    if _UNUSED.fullmatch(name) or (spec.vision is None and _EYES.fullmatch(name)):
        return
    found = _HUB_LAYER.fullmatch(name)
    index, rest = (int(found[1]), found[2]) if found else (0, "")
    part_name = _HUB_PARTS.get(rest)
    delta = spec.layers[index].delta if index < len(spec.layers) else None
    if part_name is not None and isinstance(delta, DeltaNet):
        if part_name == "rate":
            tensor = computed(tensor, np.exp)
        yield from _of_delta(f"model.layers.{index}.linear_attn.", part_name, delta, tensor)
    elif rest == "self_attn.q_proj.weight":
        yield from _query(name, "self_attn.q_gate.weight", spec.layers[index].attention, tensor)
    elif rest == "mlp.experts.gate_up_proj":
        yield from _experts(f"model.layers.{index}.mlp.experts.*.gate_proj.weight", "up_proj", tensor)
    elif rest == "mlp.experts.down_proj":
        yield f"model.layers.{index}.mlp.experts.*.down_proj.weight", tensor
    else:
        yield name, computed(tensor, _plus_one) if _NORMS.fullmatch(name) else tensor


def _from_gguf(spec: ModelSpec, name: str, tensor: Tensor) -> Named:
    found = _GGUF_LAYER.fullmatch(name)
    index, rest = (int(found[1]), found[2]) if found else (0, "")
    if index >= len(spec.layers):
        return  # several tokens at once, as `_UNUSED`
    part_name, delta = _GGUF_PARTS.get(rest), spec.layers[index].delta
    if part_name is not None and isinstance(delta, DeltaNet):
        if part_name == "rate":
            tensor = computed(tensor, np.negative)
        yield from _of_delta(f"blk.{index}.linear_attn.", part_name, delta, tensor)
    elif rest == "attn_q.weight":
        yield from _query(name, "attn_q_gate.weight", spec.layers[index].attention, tensor)
    elif rest == "ffn_gate_up_exps.weight":
        yield from _experts(f"blk.{index}.ffn_gate_exps.weight", "ffn_up_exps", tensor)
    else:
        yield name.replace(".post_attention_norm.", ".ffn_norm."), tensor


def _of_delta(prefix: str, name: str, d: DeltaNet, tensor: Tensor) -> Named:
    """The slots that a tensor of a delta net fills; one of a wrong shape is left for the complaint about it."""
    shared = d.value_heads // d.key_heads
    match name:
        case "qkv" | "conv":
            suffix = "_conv" if name == "conv" else ""
            if name == "conv" and len(tensor.shape) == 3:
                tensor = Tensor(tensor.name, (tensor.shape[0], tensor.shape[2]), tensor.type, tensor.data)
            ends = (0, d.key_width, 2 * d.key_width, d.width)
            if tensor.shape[0] != d.width:
                yield prefix + "q" + suffix, tensor
                return
            for letter, first, last in zip("qkv", ends, ends[1:], strict=False):
                yield prefix + letter + suffix, part(tensor, OUTPUTS, first, last)
        case "qkvz":
            sizes = (d.key_dim, d.key_dim, shared * d.value_dim, shared * d.value_dim)
            yield from _by_head(prefix, ("q", "k", "v", "z"), sizes, d.key_heads, tensor)
        case "ba":
            yield from _by_head(prefix, ("beta", "decay"), (shared, shared), d.key_heads, tensor)
        case _:
            yield prefix + name, tensor


def _by_head(prefix: str, names: tuple[str, ...], sizes: tuple[int, ...], heads: int, tensor: Tensor) -> Named:
    """Cut a matrix that has, for each head, so many rows of each of these."""
    if tensor.shape[0] != heads * sum(sizes):
        yield prefix + names[0], tensor
        return
    places = np.arange(tensor.shape[0], dtype=np.intp).reshape(heads, sum(sizes))
    ends = np.cumsum((0, *sizes)).tolist()
    for name, first, last in zip(names, ends, ends[1:], strict=False):
        yield prefix + name, rows(tensor, places[:, first:last].reshape(-1))


def _query(name: str, gate: str, a: Attention, tensor: Tensor) -> Named:
    """The queries of each head and its output gate, which are stored head by head."""
    if not a.out_gate or tensor.shape[0] != 2 * a.heads * a.head_dim:
        yield name, tensor
        return
    places = np.arange(tensor.shape[0], dtype=np.intp).reshape(a.heads, 2, a.head_dim)
    yield name, rows(tensor, places[:, 0].reshape(-1))
    stem = name.removesuffix("self_attn.q_proj.weight").removesuffix("attn_q.weight")
    yield stem + gate, rows(tensor, places[:, 1].reshape(-1))


def _experts(name: str, up: str, tensor: Tensor) -> Named:
    size = tensor.shape[1] // 2
    yield name, part(tensor, OUTPUTS, 0, size)
    yield name.replace("gate_proj", up).replace("ffn_gate_exps", up), part(tensor, OUTPUTS, size, 2 * size)


def _plus_one(values: Floats) -> Floats:
    return values + np.float32(1)


def computed(tensor: Tensor, function: Callable[[Floats], Floats]) -> MadeTensor:
    """The tensor in float32 with a function applied to its values."""
    return MadeTensor(tensor.name, tensor.shape, "F32", partial(_values, tensor, function))


def _values(tensor: Tensor, function: Callable[[Floats], Floats]) -> Bytes:
    return np.ascontiguousarray(function(dequantize(tensor)), dtype=np.float32).reshape(-1).view(np.uint8)
