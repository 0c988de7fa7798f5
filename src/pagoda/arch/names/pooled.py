"""What checkpoints of pooled models call the slots of a spec, and what they may hold that no slot needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_MODEL_NAMES = MappingProxyType(
    {
        "embed": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
    }
)
_LAYER_NAMES = MappingProxyType(
    {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
)
# BERT's classifier stands behind the pooler that it was trained with; RoBERTa's has a layer of its own
_BERT_HEAD = MappingProxyType({"pool_dense": "pooler.dense", "score": "classifier"})
_ROBERTA_HEAD = MappingProxyType({"pool_dense": "classifier.dense", "score": "classifier.out_proj"})

_PREFIX = re.compile(r"(bert|roberta|xlm_roberta|model)\.")
# heads that were trained beside the model, and tables that hold 0, 1, 2, ...
_UNUSED = re.compile(
    r"(pooler|cls|classifier|lm_head|score|qa_outputs)\..*|output\.weight"
    r"|embeddings\.(position_ids|token_type_ids)"
)


def encoder_name(spec: ModelSpec, slot: str) -> str:
    """The name of the tensor that fills a slot of an encoder, such as `encoder.layer.0.output.dense.weight`."""
    prefix, _, part = slot.rpartition(".")
    stem = part.removesuffix("_bias")
    suffix = "bias" if part.endswith("_bias") else "weight"
    if prefix:
        return f"encoder.layer.{prefix.removeprefix('layers.')}.{_LAYER_NAMES[stem]}.{suffix}"
    head = _BERT_HEAD if spec.model_type == "bert" else _ROBERTA_HEAD
    return f"{_MODEL_NAMES.get(stem) or head[stem]}.{suffix}"


def plain_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pooled model's tensors under one spelling: such models are stored with and without their outer class."""
    return {_plain(spec, old): tensor for old, tensor in tensors.items()}


def unused(name: str) -> bool:
    return _UNUSED.fullmatch(name) is not None


def _plain(spec: ModelSpec, name: str) -> str:
    if spec.encoder is None:
        inner = name.startswith(("layers.", "embed_tokens.", "norm."))
        return f"model.{name}" if inner else name
    name = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
