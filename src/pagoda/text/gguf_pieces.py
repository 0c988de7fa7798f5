"""The tokenizers of encoders in GGUF files: WordPiece and Unigram, and what stands around a text and between two."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from pagoda.errors import ModelError
from pagoda.text.files import id_list

_SPACE = "▁"
_NORMAL = 1
_LONGEST_WORD = 100  # BERT's own limit
_CAPITAL = re.compile("▁[A-Z]")
_KEY = "tokenizer.ggml."


def word_pieces(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> tokenizers.Tokenizer:
    """WordPiece (BERT). In GGUF a mark stands before the beginnings of words, and none before what continues them.

    Few files say whether the text is lowercased: one whose words have no capitals was made of such text.
    """
    vocab = {_with_hashes(token, types[i]): i for i, token in enumerate(tokens)}
    unknown = _token(metadata, tokens, "unknown_token_id", "[UNK]")
    pieces = models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=_LONGEST_WORD)
    backend = tokenizers.Tokenizer(pieces)
    lowercase = metadata.get(_KEY + "normalizer.lowercase")
    if lowercase is None:
        lowercase = not any(map(_CAPITAL.match, tokens))
    accents = metadata.get(_KEY + "normalizer.strip_accents")
    strip = None if accents is None else bool(accents)
    backend.normalizer = normalizers.BertNormalizer(lowercase=bool(lowercase), strip_accents=strip)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _with_hashes(token: str, kind: int) -> str:
    if kind != _NORMAL:
        return token
    return token[1:] if token.startswith(_SPACE) else f"##{token}"


def unigram(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Unigram (arXiv 1804.10959) as XLM-RoBERTa has it: words apart, each with the mark of a space before it."""
    scores = metadata.get(_KEY + "scores")
    if not isinstance(scores, Sequence) or len(scores) != len(tokens):
        raise ModelError(f"the GGUF file lacks {_KEY}scores, so its tokenizer can't be rebuilt")
    unknown = id_list(metadata.get(_KEY + "unknown_token_id"))
    place = unknown[0] if unknown else tokens.index("<unk>") if "<unk>" in tokens else None
    try:
        backend = tokenizers.Tokenizer(models.Unigram([*zip(tokens, map(float, scores), strict=True)], place, False))
        if (table := metadata.get(_KEY + "precompiled_charsmap")) is not None:
            raw = table if isinstance(table, bytes) else np.asarray(table).astype(np.uint8).tobytes()
            backend.normalizer = normalizers.Precompiled(raw)
    except Exception as e:  # the library raises a bare Exception
        raise ModelError(f"the GGUF file's vocabulary is broken: {e}", remedy="Download the file again") from e
    prefix = "always" if metadata.get(_KEY + "add_space_prefix", True) else "never"
    cuts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, prefix)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return backend


def frame(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], *, types: bool) -> None:
    """Put the tokens around a text that the model was trained with: [CLS] a [SEP], and [CLS] a [SEP] b [SEP].

    Without `types` nothing else tells two texts apart, and there are two between them: <s> a </s></s> b </s>.
    """
    begin = _token(metadata, tokens, "cls_token_id", "") or _token(metadata, tokens, "bos_token_id", "[CLS]")
    end = _token(metadata, tokens, "seperator_token_id", "") or _token(metadata, tokens, "eos_token_id", "[SEP]")
    between = [f"{end}:0"] if types else [f"{end}:0", f"{end}:0"]
    second = 1 if types else 0
    backend.post_processor = processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[f"{begin}:0", "$A:0", *between, f"$B:{second}", f"{end}:{second}"],
        special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys((begin, end))],
    )


def _token(metadata: Mapping[str, Any], tokens: Sequence[str], name: str, usual: str) -> str:
    """The token that a key of the table names."""
    ids = id_list(metadata.get(_KEY + name))
    if ids and ids[0] < len(tokens):
        return tokens[ids[0]]
    if usual and usual not in tokens:
        raise ModelError(
            f"the GGUF file lacks {_KEY}{name}, so its tokenizer can't be rebuilt",
            remedy="Take another GGUF file of the model, or its safetensors version",
        )
    return usual
