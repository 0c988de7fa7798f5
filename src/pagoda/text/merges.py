"""GPT-2's tokenizer in its first form, which DialoGPT still has: vocab.json and merges.txt."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pagoda.errors import ModelError
from pagoda.text.files import read_json, read_text


def read_merges(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder that `has_merges`."""
    lines = (read_text(folder / "merges.txt") or "").splitlines()
    cuts = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
    try:
        model = models.BPE(read_json(folder, "vocab.json"), [(left, right) for left, _, right in cuts])
    except Exception as e:  # the library raises a bare Exception
        raise ModelError(
            f"cannot read vocab.json and merges.txt in {folder}: {e}", remedy="Download both files again"
        ) from e
    backend = tokenizers.Tokenizer(model)
    spaced = read_json(folder, "tokenizer_config.json").get("add_prefix_space") is True
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = decoders.ByteLevel()
    return backend
