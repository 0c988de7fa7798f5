"""Whether and how a model is pooled into embeddings or scores: from its own files, and from what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec, Pooling
from pagoda.errors import ModelError
from pagoda.options.tasks import Task
from pagoda.text.sentence import sentence_files
from pagoda.weights.source import TensorSource

Kind = Literal["cls", "mean", "last"]

ANSWERS = ("no", "yes")
"""The tokens between which a reranker that was made of a chat model decides."""

_GGUF_KINDS: Mapping[int, Kind] = {1: "mean", 2: "cls", 3: "last"}


def with_pooling(spec: ModelSpec, source: TensorSource, task: Task) -> ModelSpec:
    """The spec as it is run for a task; ModelError for one that the model cannot do.

    `auto` does what it was made for, and `pooling` makes an embedding model of one that was made for text.
    """
    classifies = "ForSequenceClassification" in _made_for(source.config)
    if spec.encoder is None and (task == "generate" or (task == "auto" and not (classifies or _embeds(spec, source)))):
        return spec
    if task == "generate":
        raise ModelError(f"{spec.model_type} models generate no text", remedy="Leave --runner and --task out")
    if task == "score" and not classifies:
        return replace(spec, pooling=_by_answers(spec, source))
    spec = replace(spec, head_bias=False, logit_scale=1.0)
    if classifies and task != "embed":
        return replace(spec, pooling=_classifier(spec, source))
    files = sentence_files(source.path)
    default: Kind = "cls" if spec.encoder is not None else "last"
    kind = _kind(files.pooling) or _gguf_kind(spec, source) or default
    return replace(spec, pooling=Pooling(kind, max_len=files.max_len))


def _made_for(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _embeds(spec: ModelSpec, source: TensorSource) -> bool:
    """Is this decoder an embedding model by its own files?"""
    if source.metadata:
        return _gguf_kind(spec, source) is not None
    return (Path(source.path) / "modules.json").is_file() and sentence_files(source.path).pooling is not None


def _kind(name: str | None) -> Kind | None:
    return next((kind for kind in _GGUF_KINDS.values() if kind == name), None)


def _gguf_kind(spec: ModelSpec, source: TensorSource) -> Kind | None:
    given = source.metadata.get(f"{spec.model_type}.pooling_type")
    return _GGUF_KINDS.get(int(given)) if given is not None else None


def _classifier(spec: ModelSpec, source: TensorSource) -> Pooling:
    fields = Fields(source.config, "config.json")
    names = fields.get("id2label")
    labels = len(names) if isinstance(names, dict) and names else fields.integer("num_labels", 2)
    if spec.encoder is None:
        return Pooling("last", labels)
    return Pooling("cls", labels, dense=True, out_bias=True, max_len=sentence_files(source.path).max_len)


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
