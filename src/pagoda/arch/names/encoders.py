"""What checkpoints of encoders call the slots of a spec, and their other spellings under that one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from types import MappingProxyType

from pagoda.arch.spec import ModelSpec
from pagoda.weights.parts import OUTPUTS, part
from pagoda.weights.source import Tensor

_Names = Mapping[str, str]

_EMBEDDINGS: _Names = MappingProxyType(
    {
        "embed": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
    }
)
_BERT: _Names = MappingProxyType(
    {
        **_EMBEDDINGS,
        "layers": "encoder.layer",
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
        # the classifier stands behind the pooler that the model was trained with
        "pool_dense": "pooler.dense",
        "score": "classifier",
    }
)
_ROBERTA: _Names = MappingProxyType({**_BERT, "pool_dense": "classifier.dense", "score": "classifier.out_proj"})
_TURNING: _Names = MappingProxyType(
    {
        **_EMBEDDINGS,
        "layers": "layers",
        **{name: f"self_attn.{name}_proj" for name in "qkvo"},
        "attn_norm": "post_attention_layernorm",
        **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        "mlp_norm": "post_mlp_layernorm",
        "pool_dense": "pooler.dense",
        "score": "classifier",
    }
)
"""Of BERTs that turn queries and keys, as transformers writes them."""
_JINA: _Names = MappingProxyType(
    {
        **_TURNING,
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "pool_dense": "classifier.dense",
        "score": "classifier.out_proj",
    }
)
_MODERN: _Names = MappingProxyType(
    {
        "embed": "embeddings.tok_embeddings",
        "embed_norm": "embeddings.norm",
        "norm": "final_norm",
        "layers": "layers",
        **{name: f"attn.{name}" for name in "qkv"},
        "o": "attn.Wo",
        "attn_norm": "attn_norm",
        "gate": "mlp.gate",
        "up": "mlp.up",
        "down": "mlp.Wo",
        "mlp_norm": "mlp_norm",
        "pool_dense": "head.dense",
        "pool_norm": "head.norm",
        "score": "classifier",
    }
)
_GGUF: _Names = MappingProxyType(
    {
        "embed": "token_embd",
        "positions": "position_embd",
        "types": "token_types",
        "embed_norm": "token_embd_norm",
        "norm": "output_norm",
        "layers": "blk",
        **{name: f"attn_{name}" for name in "qkv"},
        "o": "attn_output",
        "attn_norm": "attn_output_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
        "mlp_norm": "layer_output_norm",
        "pool_dense": "cls",
        "pool_norm": "cls.norm",
        "score": "cls.output",
    }
)
_GGUF_MODERN: _Names = MappingProxyType({**_GGUF, "attn_norm": "attn_norm", "mlp_norm": "ffn_norm"})

FAMILIES: Mapping[str, tuple[_Names, _Names]] = MappingProxyType(
    {
        "bert": (_BERT, _GGUF),
        "roberta": (_ROBERTA, _GGUF),
        "xlm_roberta": (_ROBERTA, _GGUF),
        "nomic_bert": (_TURNING, _GGUF),
        "gte": (_TURNING, _GGUF),
        "jina_embeddings_v3": (_JINA, _GGUF),
        "modernbert": (_MODERN, _GGUF_MODERN),
    }
)
"""By model type, the names in safetensors and in GGUF."""

_PREFIX = re.compile(r"(bert|roberta|xlm_roberta|nomic_bert|gte|new|model)\.")
_OLD_ENDS = ((".gamma", ".weight"), (".beta", ".bias"))
_QKV, _O = ".self_attn.qkv.", ".self_attn.o_proj."
_NORMS = ((".norm1.", ".post_attention_layernorm."), (".norm2.", ".post_mlp_layernorm."))
_OLD_FIRST = (("emb_ln.", "embeddings.LayerNorm."), ("encoder.layers.", "layers."))
_OTHERS: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "nomic_bert": (
            *_OLD_FIRST,
            (".attn.Wqkv.", _QKV),
            (".attn.out_proj.", _O),
            *_NORMS,
            (".fc11.", ".up_proj."),
            (".fc12.", ".gate_proj."),
            (".fc2.", ".down_proj."),
        ),
        "gte": (
            ("encoder.layer.", "layers."),
            (".attention.qkv_proj.", _QKV),
            (".attention.o_proj.", _O),
            (".attn_ln.", ".post_attention_layernorm."),
            (".mlp_ln.", ".post_mlp_layernorm."),
        ),
        "jina_embeddings_v3": (*_OLD_FIRST, (".mixer.Wqkv.", _QKV), (".mixer.out_proj.", _O), *_NORMS),
    }
)
"""How their makers spelled what transformers has named since."""
_PIECES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "self_attn.qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
        "attn.Wqkv": tuple(f"attn.{name}" for name in "qkv"),
        "attn_qkv": tuple(f"attn_{name}" for name in "qkv"),
        "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
        "mlp.Wi": ("mlp.gate", "mlp.up"),
        "ffn_up": ("ffn_gate", "ffn_up"),
    }
)
"""What may hold several matrices, in the order of their outputs."""
_LAYER = re.compile(r"(layers|blk)\.(\d+)\.(.+)\.(weight|bias)")


def encoder_name(spec: ModelSpec, slot: str, *, gguf: bool) -> str:
    """The name of the tensor that fills a slot of an encoder, such as `encoder.layer.0.output.dense.weight`."""
    names = FAMILIES[spec.model_type][gguf]
    prefix, _, part_name = slot.rpartition(".")
    stem = part_name.removesuffix("_bias")
    suffix = "bias" if part_name.endswith("_bias") else "weight"
    layer = f"{names['layers']}.{prefix.removeprefix('layers.')}." if prefix else ""
    return f"{layer}{names[stem]}.{suffix}"


def encoder_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's tensors under the one spelling that slots are looked up by, q, k and v apart, gate and up too."""
    plain = ((_plain(spec, name), tensor) for name, tensor in tensors.items())
    return dict(found for name, tensor in plain for found in _pieces(spec, name, tensor))


def _plain(spec: ModelSpec, name: str) -> str:
    """Such models are stored with and without their outer class."""
    name = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
    for old, new in (*_OLD_ENDS, *_OTHERS.get(spec.model_type, ())):
        name = name.replace(old, new)
    return name


def _pieces(spec: ModelSpec, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    found = _LAYER.fullmatch(name)
    prefix, layer, stem, suffix = found.groups() if found else ("", "", "", "")
    names = _PIECES.get(stem, ())
    axis = OUTPUTS if len(tensor.shape) > 1 else -1
    each = spec.layers[0].mlp.size if len(names) == 2 else spec.layers[0].attention.q_width
    if not names or tensor.shape[axis] != len(names) * each:
        yield name, tensor
        return
    for own, (first, last) in zip(names, pairwise(accumulate([each] * len(names), initial=0)), strict=True):
        yield f"{prefix}.{layer}.{own}.{suffix}", part(tensor, axis, first, last)
