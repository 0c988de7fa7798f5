"""The tokenizer of a GGUF file, rebuilt from its metadata without passing through any slow conversion."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from pagoda.errors import ModelError
from pagoda.text.files import id_list
from pagoda.text.gguf_pieces import frame, unigram, word_pieces
from pagoda.text.pieces import Pieces

log = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"
_FRAMES = ("bos", "eos", "cls", "seperator", "padding", "mask")
_ROBERTA = "</s>"  # RoBERTa's separator, which stands twice between two texts
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_DOWNLOAD = "Download the file again, or take one from another source"

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"

_KIMI = (
    r"\p{Han}+|"
    + (_CASED % (_CONTRACTION + "?", _CONTRACTION + "?")).replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]")
    + rf"|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
)
"""Chinese characters stand apart from the words around them."""


class _Pre(NamedTuple):
    """How a family cuts text before merging: patterns one after the other, then GPT-2's own where `gpt2` says so."""

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = _Pre(gpt2=True)
_DIGITS = _Pre((r"\p{N}",), gpt2=True)
_LLAMA3_PATTERN = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_LLAMA3 = _Pre((_LLAMA3_PATTERN,), ignore_merges=True, add_bos=True)
_QWEN2_PATTERN = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
_CJK = r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
_CASED_LETTERS = "".join(
    "-".join(chr(int(end, 16)) for end in run.split("-"))
    for run in (
        "b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1 3a3-3f5 "
        "3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a "
        "1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe "
        "1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d "
        "2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee "
        "2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a "
        "ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
    ).split()
)
"""Letters that have a case, of an old Unicode."""
_FAMILIES: dict[str, _Pre] = {
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "mellum", "olmo", "roberta-bpe", "mpt", "jais", "default"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    "lfm2": _LLAMA3,
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), _Pre((_LLAMA3_PATTERN,))),
    **dict.fromkeys(("glm4", "glm5"), _Pre((_LLAMA3_PATTERN,), ignore_merges=True)),
    **dict.fromkeys(
        ("bailingmoe", "bailingmoe2"),
        _Pre((rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",)),
    ),
    "qwen2": _Pre((_QWEN2_PATTERN,), nfc=True),
    "seed-coder": _Pre((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",)),
    "exaone4": _GPT2,
    "modern-bert": _Pre(gpt2=True, nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open"), _Pre((_QWEN2_PATTERN,))),
    "qwen35": _Pre(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        ),
        nfc=True,
    ),
    "tekken": _Pre((_CASED % ("", "") + rf"|\p{{N}}|{_CASED_SIGNS}",), ignore_merges=True, add_bos=True),
    **dict.fromkeys(
        ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
        _Pre((_CASED % (_CONTRACTION + "?", _CONTRACTION + "?") + rf"|\p{{N}}{{1,3}}|{_CASED_SIGNS}",)),
    ),
    "exaone-moe": _Pre(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "kimi-k2": _Pre((_KIMI,)),
    "deepseek-coder": _Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-llm": _Pre(
        (
            r"[\r\n]",
            rf"\s?[A-Za-z{_CASED_LETTERS}]+",
            r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        )
    ),
    **dict.fromkeys(
        ("deepseek-v3", "hunyuan-dense"),
        _Pre(
            (
                r"\p{N}{1,3}",
                r"[一-龥぀-ゟ゠-ヿ]+",
                r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
            )
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """What a GGUF table says about the tokenizer. `tokens` is indexed by id."""

    backend: tokenizers.Tokenizer
    pieces: Pieces
    tokens: Sequence[str]
    bos_token_id: int | None
    eos_token_id: int | None
    end_token_ids: tuple[int, ...]
    add_bos: bool | None
    add_eos: bool | None
    """None: as `backend` frames texts."""


def build_gguf_vocab(metadata: Mapping[str, Any]) -> GgufVocab:
    """Rebuild the tokenizer; raise ModelError, naming the key, where the table lacks what its kind needs."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = _types(metadata, len(tokens))
    built = _built(model, metadata, tokens, types)
    _add_tokens(built.backend, tokens, built.types, str(model))
    framed = model in ("bert", "t5") or str(metadata.get("general.architecture")).endswith("bert")
    if framed:
        frame(built.backend, metadata, tokens, types=model != "t5" and _ROBERTA not in tokens)
    eos = _token_id(metadata, "eos_token_id", len(tokens))
    ends = [_token_id(metadata, key, len(tokens)) for key in _END_KEYS]
    return GgufVocab(
        built.backend,
        built.pieces,
        tokens,
        _token_id(metadata, "bos_token_id", len(tokens)),
        eos,
        tuple(dict.fromkeys(i for i in ends if i is not None)),
        None if framed else _adds_bos(model, metadata, built.add_bos),
        None if framed else bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    )


def _adds_bos(model: Any, metadata: Mapping[str, Any], usual: bool) -> bool:
    # Gemma 4 needs it, and files say that it does not.
    return model == "gemma4" or bool(metadata.get("tokenizer.ggml.add_bos_token", usual))


class _Built(NamedTuple):
    """A tokenizer without its special tokens. `types`: of the tokens, as it needs them."""

    backend: tokenizers.Tokenizer
    pieces: Pieces
    types: list[int]
    add_bos: bool = True


def _built(model: Any, metadata: Mapping[str, Any], tokens: Sequence[str], types: list[int]) -> _Built:
    match model:
        case "gpt2":
            family = _family(metadata.get("tokenizer.ggml.pre"))
            return _Built(_byte_level(metadata, tokens, family), Pieces("byte"), types, family.add_bos)
        case "llama":
            prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
            types = _spaces_as_normal(tokens, types) if prefix else types
            pieces = Pieces("space", _SPACE, strip_first=prefix)
            return _Built(_sentencepiece(metadata, tokens, types, prefix), pieces, types)
        case "gemma4":
            return _Built(_spaced(metadata, tokens), Pieces("space", _SPACE, strip_first=False), types)
        case "bert":
            types = _marked_control(metadata, types)
            return _Built(word_pieces(metadata, tokens, types), Pieces("word", "##", strip_first=True), types)
        case "t5":
            types = _marked_control(metadata, types)
            return _Built(unigram(metadata, tokens), Pieces("space", _SPACE, strip_first=True), types)
    raise ModelError(
        f"the GGUF file has a tokenizer of kind {model!r}; gpt2, llama, gemma4, bert and t5 can be rebuilt",
        remedy="Take another GGUF file of the model, or its safetensors version",
    )


def _marked_control(metadata: Mapping[str, Any], types: list[int]) -> list[int]:
    """The types, with the tokens that the table has a use for as control tokens: not all files say so."""
    found = [_token_id(metadata, f"{name}_token_id", len(types)) for name in _FRAMES]
    return [_CONTROL if i in found else kind for i, kind in enumerate(types)]


def _strings(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    value = metadata.get(key)
    if isinstance(value, str) or not isinstance(value, Sequence) or not value or not isinstance(value[0], str):
        raise ModelError(f"the GGUF file lacks {key}, so its tokenizer can't be rebuilt", remedy=_DOWNLOAD)
    return value


def _token_id(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    ids = id_list(metadata.get(f"tokenizer.ggml.{name}"))
    return ids[0] if ids and ids[0] < size else None


def _types(metadata: Mapping[str, Any], size: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = [_NORMAL] * size
        for key in (*_END_KEYS, "bos_token_id"):
            if (token := _token_id(metadata, key, size)) is not None:
                types[token] = _CONTROL
    if not isinstance(types, list):
        raise ModelError("tokenizer.ggml.token_type in the GGUF file is no list", remedy=_DOWNLOAD)
    if len(types) != size:
        raise ModelError(f"the GGUF file has {size} tokens but {len(types)} token types", remedy=_DOWNLOAD)
    return list(types)


def _spaces_as_normal(tokens: Sequence[str], types: Sequence[int]) -> list[int]:
    """User-defined tokens with spaces match in normalized text, which the prefix disturbs: merge them instead."""
    return [_NORMAL if t == _USER_DEFINED and _SPACE in tokens[i] else t for i, t in enumerate(types)]


def _family(name: Any) -> _Pre:
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        log.warning("the GGUF file's pre-tokenizer %r is not known: using GPT-2's, which may cost some quality", name)
        return _GPT2
    return family


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], family: _Pre) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = _model(vocab, _merges(metadata, vocab), ignore_merges=family.ignore_merges)
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in family.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if family.nfc:
        backend.normalizer = normalizers.NFC()
    return backend


def _spaced(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Merges of characters, over lines without their ends: a run of these is one token where there is such a token."""
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = _token_id(metadata, "unknown_token_id", len(tokens))
    backend = _model(
        vocab,
        _merges(metadata, vocab),
        byte_fallback=True,
        fuse_unk=True,
        ignore_merges=True,
        unk_token=tokens[unknown] if unknown is not None else None,
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    return backend


def _merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    same = {token: token for token in vocab}  # or each would be there again in all its merges
    cuts = (merge.partition(" ") for merge in _strings(metadata, "tokenizer.ggml.merges"))
    return [(same.get(left, left), same.get(right, right)) for left, _, right in cuts]


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], prefix: bool
) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ModelError("the GGUF file lacks tokenizer.ggml.scores, so its tokenizer can't be rebuilt")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = _token_id(metadata, "unknown_token_id", len(tokens))
    backend = _model(
        vocab,
        _merges_of_scores(tokens, types, scores),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=tokens[unknown] if unknown is not None else None,
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if prefix:
        spaces.insert(0, normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence(spaces)
    return backend


def _merges_of_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores best: as merges, all cuts of the best token first."""
    plain = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    merges: list[tuple[str, str]] = []
    for token in sorted((t for t in plain if len(t) > 1), key=lambda t: (-scores[plain[t]], plain[t])):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(a, b) for a, b in cuts if a in plain and b in plain]
        merges += sorted(pairs, key=lambda pair: (plain[pair[0]], plain[pair[1]])) if len(pairs) > 1 else pairs
    return merges


def _model(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
    except Exception as e:  # the library raises a bare Exception
        raise ModelError(f"the GGUF file's vocabulary is broken: {e}", remedy=_DOWNLOAD) from e


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int], model: str) -> None:
    """Control tokens become special ones; user-defined tokens are matched whole in any text."""
    added: list[AddedToken] = []
    for i, kind in enumerate(types):
        if kind in (_UNKNOWN, _CONTROL) and tokens[i]:
            added.append(AddedToken(tokens[i], special=True, normalized=False))
        elif kind == _USER_DEFINED and tokens[i]:
            # A SentencePiece vocabulary stores its own mark for the space, which exists only after normalizing.
            marked = model in ("llama", "gemma4") and _SPACE in tokens[i]
            added.append(AddedToken(tokens[i], special=False, normalized=marked))
    backend.add_tokens(added)
