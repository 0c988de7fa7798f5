"""The vision encoder of a GGUF model, a file of its own beside it (mmproj): found, and put together with the model."""

from __future__ import annotations

import re
from pathlib import Path

from pagoda.errors import ModelError
from pagoda.weights.files import Checkpoint
from pagoda.weights.gguf import open_gguf

MARK = "mmproj"
_SEEING = ("qwen2vl", "qwen3vl", "qwen3vlmoe")
_PREFERRED = ("f16", "bf16", "f32", "q8_0")


def preferred(names: list[str]) -> str | None:
    """Of the names of such files the one to take: in 16 bits, where there are several."""
    found = sorted(n for n in names if MARK in n.rpartition("/")[2].lower() and n.lower().endswith(".gguf"))
    return min(found, key=_rank, default=None)


def _rank(name: str) -> int:
    kinds = enumerate(_PREFERRED)
    return next((i for i, kind in kinds if re.search(rf"(?<![a-z]){kind}", name.lower())), len(_PREFERRED))


def with_mmproj(model: Checkpoint) -> Checkpoint:
    """The model with the encoder that lies beside it, if it is one that can take that."""
    if model.metadata.get("general.architecture") not in _SEEING:
        return model
    folder = Path(model.path).parent
    name = preferred([file.name for file in folder.iterdir()])
    if name is None:
        return model
    encoder = open_gguf(folder / name)
    if encoder.metadata.get("general.architecture") != "clip":
        raise ModelError(f"{folder / name} is no image encoder", remedy="Take it out of the model's folder")
    own = {key: value for key, value in encoder.metadata.items() if key.startswith("clip.")}
    return Checkpoint(model.path, {**model.metadata, **own}, {}, {**model.tensors, **encoder.tensors})
