"""Whether and how a model is pooled into embeddings or scores: from its own files, and from what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from pagoda.arch.decoder import ACTIVATIONS
from pagoda.arch.fields import Fields
from pagoda.arch.pooled_spec import Pooling
from pagoda.arch.projections import projections
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.options.tasks import Task
from pagoda.text.sentence import sentence_files
from pagoda.weights.source import TensorSource

Kind = Literal["cls", "mean", "last"]

ANSWERS = ("no", "yes")
"""The tokens between which a reranker that was made of a chat model decides."""

_SCORE = "cls.output.weight"
_GGUF_KINDS: Mapping[int, Kind] = {1: "mean", 2: "cls", 3: "last"}


def with_pooling(spec: ModelSpec, source: TensorSource, task: Task) -> ModelSpec:
    """The spec as it is run for a task; ModelError for one that the model cannot do.

    `auto` does what it was made for, and `pooling` makes an embedding model of one that was made for text.
    """
    classifies = _classifies(spec, source)
    if spec.encoder is None and (task == "generate" or (task == "auto" and not (classifies or _embeds(spec, source)))):
        return spec
    if task == "generate":
        raise ModelError(f"{spec.model_type} models generate no text", remedy="Leave --runner and --task out")
    if task == "score" and not classifies:
        return replace(spec, pooling=_by_answers(spec, source))
    spec = replace(spec, head_bias=False, logit_scale=1.0)
    if classifies and task != "embed":
        pooling = _gguf_classifier(spec, source) if source.metadata else _classifier(spec, source)
        return replace(spec, pooling=pooling)
    files = sentence_files(source.path)
    default: Kind = "cls" if spec.encoder is not None else "last"
    kind = _kind(files.pooling) or _gguf_kind(source) or default
    behind = projections(source, files.dense)
    return replace(spec, pooling=Pooling(kind, max_len=files.max_len, projections=behind))


def _classifies(spec: ModelSpec, source: TensorSource) -> bool:
    if source.metadata:
        return _SCORE in source.tensors
    names = source.config.get("architectures")
    return isinstance(names, list) and bool(names) and "ForSequenceClassification" in str(names[0])


def _embeds(spec: ModelSpec, source: TensorSource) -> bool:
    """Is this decoder an embedding model by its own files?"""
    if source.metadata:
        return _gguf_kind(source) is not None
    return (Path(source.path) / "modules.json").is_file() and sentence_files(source.path).pooling is not None


def _kind(name: str | None) -> Kind | None:
    return next((kind for kind in _GGUF_KINDS.values() if kind == name), None)


def _gguf_kind(source: TensorSource, key: str = "pooling_type") -> Kind | None:
    given = source.metadata.get(f"{source.metadata.get('general.architecture')}.{key}")
    return _GGUF_KINDS.get(int(given)) if given is not None else None


def _classifier(spec: ModelSpec, source: TensorSource) -> Pooling:
    fields = Fields(source.config, "config.json")
    names = fields.get("id2label")
    labels = len(names) if isinstance(names, dict) and names else fields.integer("num_labels", 2)
    if spec.encoder is None:
        return Pooling("last", labels)
    usual = Pooling("cls", labels, dense=True, out_bias=True, max_len=sentence_files(source.path).max_len)
    if spec.model_type != "modernbert":
        return usual
    kind = _kind(fields.get("classifier_pooling") or "cls")
    if kind is None or kind == "last":
        raise fields.error("classifier_pooling", f"is {fields.get('classifier_pooling')!r}, must be cls or mean")
    given = fields.get("classifier_activation") or "gelu"
    if given not in ACTIVATIONS:
        raise fields.error("classifier_activation", f"is {given!r}; supported: {', '.join(ACTIVATIONS)}")
    bias = fields.flag("classifier_bias", False)
    return replace(usual, kind=kind, dense_bias=bias, dense_norm=True, activation=ACTIVATIONS[given])


def _gguf_classifier(spec: ModelSpec, source: TensorSource) -> Pooling:
    """As its tensors say; only ModernBERT's has a norm."""
    tensors, normed = source.tensors, "cls.norm.weight" in source.tensors
    labels = tensors[_SCORE].shape[0]
    if spec.encoder is None:
        answers = [*source.metadata.get("qwen3.classifier.output_labels", ())] == ["yes", "no"]
        return Pooling("last", 1, answers=True) if answers and labels == 2 else Pooling("last", labels)
    if "cls.weight" not in tensors:
        raise ModelError(
            "this file has lost the layer in front of its classifier, without which its scores mean nothing",
            remedy="Take the model's safetensors version",
        )
    usual: Kind = "mean" if normed else "cls"
    return Pooling(
        _gguf_kind(source, "classifier.pooling_type") or usual,
        labels,
        dense=True,
        dense_bias="cls.bias" in tensors,
        dense_norm=normed,
        activation="gelu" if normed else "tanh",
        out_bias="cls.output.bias" in tensors,
    )


def _by_answers(spec: ModelSpec, source: TensorSource) -> Pooling:
    if spec.encoder is not None:
        raise ModelError(
            "this model has no head that gives scores: it makes embeddings",
            remedy="Leave --task and --convert out, or take a reranking model",
        )
    if spec.head_bias or spec.logit_scale != 1:
        raise ModelError(f"{spec.model_type} models cannot score by the tokens that they answer with")
    ids = _token_ids(source)
    if not all(0 <= i < spec.vocab_size for i in ids):
        raise ModelError(f"the tokens {' and '.join(ANSWERS)} that a reranker answers with are not in the vocabulary")
    return Pooling("last", 1, tokens=(ids[0], ids[1]))


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] = {}


class _TokenizerFile(msgspec.Struct):
    model: _Vocabulary


def _token_ids(source: TensorSource) -> list[int]:
    """The ids of ANSWERS; -1 for one that is no token of its own."""
    if source.metadata:
        tokens = list(source.metadata.get("tokenizer.ggml.tokens", ()))
        return [tokens.index(text) if text in tokens else -1 for text in ANSWERS]
    path = Path(source.path) / "tokenizer.json"
    try:
        vocab = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile).model.vocab
    except (OSError, msgspec.MsgspecError) as e:
        raise ModelError(f"cannot read {path}: {e}", remedy="Download the file again") from e
    return [vocab.get(text, -1) for text in ANSWERS]
