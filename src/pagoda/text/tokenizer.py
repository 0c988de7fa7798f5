"""Text to token ids and back: a tokenizer.json, GPT-2's older files, or the tokenizer rebuilt from GGUF metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import tokenizers
from tokenizers import AddedToken

from pagoda.errors import BadRequest, ModelError
from pagoda.text.files import declared_tokens, has_merges, id_list, read_json, special_tokens
from pagoda.text.gguf_vocab import build_gguf_vocab
from pagoda.text.merges import read_merges
from pagoda.text.pieces import Pieces, from_decoder


@dataclass(frozen=True, slots=True)
class Cut:
    """A prompt that is too long is cut to `most` tokens in all; `side` is the one that loses."""

    most: int
    side: Literal["left", "right"] = "right"

    def kept(self, ids: list[int], *, around: int = 0, fixed: int = 0) -> list[int]:
        """What is left of `ids` beside `around` other tokens; the first `fixed` of them are the last to go."""
        room = max(0, self.most - around)
        if self.side == "right" or len(ids) <= room:
            return ids[:room]
        fixed = min(fixed, room)
        return [*ids[:fixed], *ids[len(ids) - room + fixed :]]


class Tokenizer:
    """Encodes and decodes; safe to use from several threads at once.

    `special_ids` are the control tokens: `skip_special_tokens` hides them, and `parse_special=False` reads their
    literals as plain text. Ids past the vocabulary (a padded embedding has them) stand for no text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pieces: Pieces | None,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> None:
        added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self._backend = backend
        self._plain = _plain_twin(backend, added)
        self._pieces = pieces
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab_size(), 1 + max(added, default=0))
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self._prefix, self._suffix = _frame(backend)
        if add_bos is not None:
            self._prefix = [bos_token_id] if add_bos and bos_token_id is not None else []
        if add_eos is not None:
            self._suffix = [self.eos_token_ids[0]] if add_eos and self.eos_token_ids else []
        # The bytes a token stands for; b"" for an id that the vocabulary does not have.
        self.token_bytes: Callable[[int], bytes] = _Bytes(self._find_bytes).__getitem__

    @property
    def prefix_ids(self) -> list[int]:
        """What `add_special_tokens` puts before a text: usually bos, or nothing."""
        return list(self._prefix)

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Finds the literals of special tokens in a text, longest first."""
        literals = sorted((self._added[i] for i in self.special_ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, literals))) if literals else None

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text. Raises BadRequest for a text that is not valid Unicode."""
        backend = self._backend if parse_special else self._plain
        ids = _encode_one(backend.encode_batch_fast, text).ids
        return self.framed(ids) if add_special_tokens else ids

    def framed(self, ids: list[int], cut: Cut | None = None) -> list[int]:
        """The ids of a text with what belongs before and after it; with `cut`, as many in all as it leaves."""
        kept = ids if cut is None else cut.kept(ids, around=len(self._prefix) + len(self._suffix))
        return [*self._prefix, *kept, *self._suffix]

    def beginning(self, text: str, most: int) -> str:
        """The text up to the end of its token number `most`."""
        offsets = self.encode_spans(text).offsets
        return text if len(offsets) <= most else text[: offsets[most - 1][1]]

    def encode_pair(self, first: str, second: str, cut: Cut | None = None) -> tuple[list[int], int | None]:
        """Ids of two texts, joined as the model was trained with, and the place of the second where types tell them
        apart. With `cut`, the second one is cut to what the first leaves of so many tokens.
        """
        a, b = self.encode_spans(first), self.encode_spans(second)
        around = self._backend.num_special_tokens_to_add(True)
        if cut is not None and len(a.ids) + len(b.ids) + around > cut.most:
            b.truncate(max(0, cut.most - len(a.ids) - around), direction=cut.side)
        joined = self._backend.post_process(a, b)
        return joined.ids, joined.type_ids.index(1) if 1 in joined.type_ids else None

    def encode_spans(self, text: str, *, parse_special: bool = True) -> tokenizers.Encoding:
        """The library's encoding, with the span of text behind each token; nothing put before or after."""
        return _encode_one((self._backend if parse_special else self._plain).encode_batch, text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        shown = (i for i in ids if not (skip_special_tokens and i in self.special_ids))
        raw = b"".join(map(self.token_bytes, shown))
        if self.strip_first and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode("utf-8", "replace")

    @property
    def strip_first(self) -> bool:
        """Whether a text's first leading space is the tokenizer's own and not shown."""
        return self._pieces is not None and self._pieces.strip_first

    def token_text(self, token_id: int) -> str:
        """A token's own text; U+FFFD where it holds only part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_piece(self, token_id: int) -> str:
        """A token as the vocabulary writes it, such as `Ġhello` for ` hello`; "" for an id that it does not have."""
        return self._added.get(token_id) or self._backend.id_to_token(token_id) or ""

    def _find_bytes(self, token_id: int) -> bytes | None:
        if self._pieces is None:
            raise ModelError(
                "the decoder in tokenizer.json is neither byte-level, SentencePiece nor WordPiece: this model can't "
                "generate text"
            )
        if token_id in self._added:
            found = self._pieces.added_to_bytes(self._added[token_id])
        else:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**31 else None
            if token is None:
                return None
            found = self._pieces.to_bytes(token)
        return found


def _encode_one(encode_batch: Callable[..., list[tokenizers.Encoding]], text: str) -> tokenizers.Encoding:
    """Encode a batch of one: the library's call for a single text holds the GIL for as long as it takes."""
    try:
        return encode_batch([text], add_special_tokens=False)[0]
    except TypeError as e:
        bad = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
        if bad is None:
            raise
        raise BadRequest(f"the text holds half of a surrogate pair at character {bad}: not valid Unicode") from e


class _Bytes(dict[int, bytes]):
    """The bytes of tokens that were looked up. Ids of no token are not remembered: there is no end of them."""

    def __init__(self, find: Callable[[int], bytes | None]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> bytes:
        found = self._find(token_id)
        if found is None:
            return b""
        self[token_id] = found
        return found


def token_table(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """The bytes of the first `size` ids; b"" for those past the vocabulary, which a padded model has."""
    return [tokenizer.token_bytes(i) if i < tokenizer.vocab_size else b"" for i in range(size)]


def load_tokenizer(model_path: str, metadata: Mapping[str, Any], *, bytes_else: bool = False) -> Tokenizer:
    """The tokenizer of a model directory or, from its metadata, of a GGUF file.

    `bytes_else`: where there is none, one whose tokens are the 256 bytes.
    """
    # Texts come one by one, and the library's threads would only push others off their cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    file = Path(model_path) / "tokenizer.json"
    if file.is_file():
        return _load_directory(file.parent, *_read_file(file))
    if has_merges(model_path):
        return _load_directory(file.parent, read_merges(file.parent), from_decoder({"type": "ByteLevel"}))
    if "tokenizer.ggml.model" in metadata:
        return _load_gguf(metadata)
    if bytes_else:
        return _byte_tokenizer()
    raise ModelError(f"there is no tokenizer.json in {model_path}", remedy=_remedy(Path(model_path)))


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, from_decoder({"type": "ByteLevel"}))


def _remedy(directory: Path) -> str:
    if any((directory / name).exists() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
        return (
            "The tokenizer is there in an older form: write the new one with transformers: "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r}); "
            "one that is code in the model's folder is read with trust_remote_code=True only"
        )
    return "Download the model's tokenizer.json into it"


class _File(msgspec.Struct):
    decoder: Any = None


def _read_file(file: Path) -> tuple[tokenizers.Tokenizer, Pieces | None]:
    try:
        raw = file.read_bytes()
        decoder = msgspec.json.decode(raw, type=_File).decoder
        backend = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as e:  # the library raises a bare Exception
        raise ModelError(f"cannot read {file}: {e}", remedy="Download the file again") from e
    backend.no_truncation()
    backend.no_padding()
    return backend, from_decoder(decoder)


def _load_directory(folder: Path, backend: tokenizers.Tokenizer, pieces: Pieces | None) -> Tokenizer:
    config = read_json(folder, "tokenizer_config.json")
    names = special_tokens(folder, {})
    _add_declared(backend, config, names)
    ends = _ids(backend, names.get("eos_token"), folder, "eos_token_id")
    starts = _ids(backend, names.get("bos_token"), folder, "bos_token_id")
    return Tokenizer(
        backend,
        pieces,
        bos_token_id=starts[0] if starts else None,
        eos_token_ids=ends,
        add_bos=_flag(config.get("add_bos_token")),
        add_eos=_flag(config.get("add_eos_token")),
    )


def _ids(backend: tokenizers.Tokenizer, text: str | None, directory: Path, key: str) -> list[int]:
    """The id of a special token named in the tokenizer's files, else those in config.json."""
    token_id = None if text is None else backend.token_to_id(text)
    return id_list(read_json(directory, "config.json").get(key)) if token_id is None else [token_id]


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _add_declared(backend: tokenizers.Tokenizer, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Tokens that tokenizer_config.json and special_tokens_map.json declare, where tokenizer.json does not."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    for i, token in declared_tokens(config).items():
        content = token["content"]
        if content and content not in known and i in (backend.get_vocab_size(), backend.token_to_id(content)):
            flags = {k: bool(token.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            backend.add_tokens([AddedToken(content, **flags)])
            known[content] = flags["special"]
    plain = [text for text in names.values() if not known.get(text) and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in plain])


def _load_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    vocab = build_gguf_vocab(metadata)
    return Tokenizer(
        vocab.backend,
        vocab.pieces,
        bos_token_id=vocab.bos_token_id,
        eos_token_ids=vocab.end_token_ids,
        add_bos=vocab.add_bos,
        add_eos=vocab.add_eos,
    )


def _plain_twin(backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken]) -> tokenizers.Tokenizer:
    """The same tokenizer, reading special tokens as text. A twin, because the switch is not safe between threads."""
    twin = tokenizers.Tokenizer(backend.model)  # shares the model
    twin.normalizer, twin.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    twin.add_tokens([added[i] for i in sorted(added)])  # the library gives ids in this order
    twin.encode_special_tokens = True
    return twin


def _frame(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer's own post-processing puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:start], full[start + len(bare) :]
