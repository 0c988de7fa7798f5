"""What the files of sentence-transformers beside a model say: how to pool it, its prompts, its longest input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagoda.errors import BadRequest, ModelError
from pagoda.text.files import read_json, read_text

_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_FLAGS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
_STEPS = ("Transformer", "Pooling", "Dense", "Normalize")
_EMBEDDING_GEMMA = (128, 256, 512, 768)
_LENGTH_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_distilbert_config.json",
)


@dataclass(frozen=True, slots=True)
class Dense:
    """A layer behind the pooling: the folder of its weights, its outputs, and what follows it."""

    folder: str
    width: int
    activation: str
    bias: bool


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """`pooling` is None where there are no such files. `default_prompt` is the text for inputs that name no prompt.

    `dimensions` are the lengths that vectors may be cut to (Matryoshka, arXiv 2205.13147): None for none, () for all.
    `labels` are the names of a classifier's classes.
    """

    pooling: str | None = None
    normalize: bool = True
    max_len: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    dimensions: tuple[int, ...] | None = None
    labels: tuple[str, ...] = ()
    dense: tuple[Dense, ...] = ()

    def prompt(self, name: str | None) -> str:
        """What goes before each text. Raises BadRequest for a name that this model does not know."""
        if name is None:
            return self.default_prompt
        if name not in self.prompts:
            raise BadRequest(
                f"prompt_name {name[:100]!r} is no prompt of this model",
                remedy=f"It has: {', '.join(self.prompts) or 'none'}",
                param="prompt_name",
            )
        return self.prompts[name]


def sentence_files(model_path: str) -> SentenceFiles:
    """Raises ModelError for a file that is broken, or for a step behind the model that is not supported."""
    folder = Path(model_path)
    text = read_text(folder / "modules.json")
    config = read_json(folder, "config_sentence_transformers.json")
    prompts = {k: v for k, v in _table(config.get("prompts")).items() if isinstance(v, str)}
    default = prompts.get(str(config.get("default_prompt_name")), "")
    max_len = next((n for name in _LENGTH_FILES if (n := read_json(folder, name).get("max_seq_length"))), None)
    max_len = max_len if isinstance(max_len, int) and max_len > 0 else None
    model = read_json(folder, "config.json")
    dimensions, labels = _dimensions(model), _labels(model)
    if text is None:
        return SentenceFiles(None, True, max_len, prompts, default, dimensions, labels)
    modules = _modules(folder, text)
    pooling = next((_pooling(folder, path) for kind, path in modules if kind == "Pooling"), None)
    normalize = any(kind == "Normalize" for kind, _ in modules)
    dense = tuple(_dense(folder, path) for kind, path in modules if kind == "Dense")
    return SentenceFiles(pooling, normalize, max_len, prompts, default, dimensions, labels, dense)


def _modules(folder: Path, text: str) -> list[tuple[str, str]]:
    """The steps of the model: the last part of each one's type, and its folder."""
    try:
        entries = json.loads(text)
        found = [(str(each["type"]).rpartition(".")[2], str(each.get("path", ""))) for each in entries]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as e:
        raise ModelError(f"{folder / 'modules.json'} is no list of modules", remedy="Download the file again") from e
    unknown = [kind for kind, _ in found if kind not in _STEPS]
    if unknown:
        raise ModelError(f"{folder / 'modules.json'}: the step {unknown[0]} behind the model is not supported")
    places = [_STEPS.index(kind) for kind, _ in found]
    if places != sorted(places):
        steps = ", ".join(kind for kind, _ in found)
        raise ModelError(f"{folder / 'modules.json'}: steps in the order {steps} are not supported")
    return found


def _dense(folder: Path, path: str) -> Dense:
    fields = _step_config(folder, path)
    width, bias = fields.get("out_features"), fields.get("bias", True)
    if not isinstance(width, int) or width < 1 or not isinstance(bias, bool):
        raise ModelError(f"{folder / path / 'config.json'} describes no layer", remedy="Download the file again")
    return Dense(path, width, str(fields.get("activation_function") or "torch.nn.modules.activation.Tanh"), bias)


def _step_config(folder: Path, path: str) -> Mapping[str, Any]:
    if Path(path).name != path:
        raise ModelError(f"{folder / 'modules.json'} names {path!r}, which is no folder beside it")
    return read_json(folder / path, "config.json")


def _pooling(folder: Path, path: str) -> str:
    config = _step_config(folder, path)
    given = config.get("pooling_mode")
    modes = [given] if isinstance(given, str) else given
    if not isinstance(modes, list):
        flags = [name.removeprefix("pooling_mode_") for name, on in config.items() if on is True and "_mode_" in name]
        modes = [_FLAGS.get(name, name) for name in flags]
    found = [_MODES.get(str(mode), str(mode)) for mode in modes]
    if len(found) != 1 or found[0] not in ("cls", "mean", "last"):
        raise ModelError(
            f"{folder / path / 'config.json'}: pooling by {' and '.join(found) or 'nothing'} is not supported",
            remedy="Models that take the first token, the last one, or the mean of all are",
        )
    return found[0]


def _dimensions(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    given = config.get("matryoshka_dimensions")
    if isinstance(given, list) and all(isinstance(each, int) for each in given):
        return tuple(given)
    if config.get("model_type") == "gemma3_text" and config.get("use_bidirectional_attention"):
        return _EMBEDDING_GEMMA
    # Qwen3-Embedding was trained for it, and its files do not say so
    return () if config.get("is_matryoshka") is True or config.get("model_type") == "qwen3" else None


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """In the order of their numbers; none where these are not 0, 1, 2, ..."""
    names = {str(number): str(name) for number, name in _table(config.get("id2label")).items()}
    return tuple(names[str(number)] for number in range(len(names)) if str(number) in names)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
