"""The vision encoder of a GGUF model, a file of its own beside it (mmproj): found, and put together with the model."""

from __future__ import annotations

import re
from pathlib import Path

from pagoda.errors import ModelError
from pagoda.weights.files import Checkpoint
from pagoda.weights.gguf import open_gguf

MARK = "mmproj"
_SEEING = ("qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "gemma3", "mistral3")
_ANY = ("internvl", "idefics3", "glm4v")
"""Projectors of encoders that go with language models of several architectures; and Mistral's are called llama too."""
_PREFERRED = ("f16", "bf16", "f32", "q8_0")


def preferred(names: list[str]) -> str | None:
    """Of the names of such files the one to take: in 16 bits, where there are several."""
    found = sorted(n for n in names if MARK in n.rpartition("/")[2].lower() and n.lower().endswith(".gguf"))
    return min(found, key=_rank, default=None)


def _rank(name: str) -> int:
    kinds = enumerate(_PREFERRED)
    return next((i for i, kind in kinds if re.search(rf"(?<![a-z]){kind}", name.lower())), len(_PREFERRED))


def with_mmproj(model: Checkpoint, file: str | None = None) -> Checkpoint:
    """The model with the encoder in a file, or else with one that lies beside it, if it is one that can take that."""
    architecture = model.metadata.get("general.architecture")
    if file is not None:
        return _together(model, Path(file), f"Give --mmproj the encoder of a {architecture} model, or leave it out")
    folder = Path(model.path).parent
    name = preferred([file.name for file in folder.iterdir()])
    if name is None:
        return model
    found = _together(model, folder / name, "Take it out of the model's folder")
    known = (*_ANY, "pixtral") if architecture == "llama" else _ANY
    return found if architecture in _SEEING or found.metadata.get("clip.projector_type") in known else model


def _together(model: Checkpoint, file: Path, remedy: str) -> Checkpoint:
    if not file.is_file():
        raise ModelError(f"{file} is no file", remedy=remedy)
    encoder = open_gguf(file)
    if encoder.metadata.get("general.architecture") != "clip":
        raise ModelError(f"{file} is no image encoder", remedy=remedy)
    own = {key: value for key, value in encoder.metadata.items() if key.startswith("clip.")}
    return Checkpoint(model.path, {**model.metadata, **own}, {}, {**model.tensors, **encoder.tensors})
