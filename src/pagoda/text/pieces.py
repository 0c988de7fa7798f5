"""The bytes behind a token's stored text, for byte-level, SentencePiece and WordPiece vocabularies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["byte", "space", "word"]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it prints, else the next free one from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(0x100 + i) for i, b in enumerate(rest)}


def _latin1_table() -> dict[int, str]:
    table = dict.fromkeys(range(256), "\uffff")  # no stored byte: makes the Latin-1 encoding below fail
    return table | {ord(char): chr(byte) for byte, char in byte_characters().items()}


_TO_LATIN1 = _latin1_table()


@dataclass(frozen=True, slots=True)
class Pieces:
    """How a vocabulary stores text: `byte` (byte-level BPE), `space` (SentencePiece: a mark for the space) or `word`
    (WordPiece: a mark where no space is).

    `strip_first`: the first token of a text drops one leading space, which encoding had put there.
    """

    kind: Kind
    mark: str = "▁"
    strip_first: bool = False

    def to_bytes(self, token: str) -> bytes:
        if self.kind == "byte":
            try:
                return token.translate(_TO_LATIN1).encode("latin-1")
            except UnicodeEncodeError:
                return token.encode("utf-8", "replace")
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        if self.kind == "word":
            return (token.removeprefix(self.mark) if token.startswith(self.mark) else f" {token}").encode()
        return self.added_to_bytes(token)

    def added_to_bytes(self, token: str) -> bytes:
        """Added tokens are stored as they are written."""
        text = token.replace(self.mark, " ") if self.kind == "space" else token
        return text.encode("utf-8", "replace")


def from_decoder(decoder: Any) -> Pieces | None:
    """Read the `decoder` entry of a tokenizer.json; None where it is of a kind that is not understood."""
    if not isinstance(decoder, dict):
        return None
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    by_type = {step.get("type"): step for step in steps or () if isinstance(step, dict)}
    if "ByteLevel" in by_type:
        return Pieces("byte")
    if "Metaspace" in by_type:
        step = by_type["Metaspace"]
        strip = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        return Pieces("space", step.get("replacement", "▁"), bool(strip))
    if "WordPiece" in by_type:
        return Pieces("word", str(by_type["WordPiece"].get("prefix", "##")), strip_first=True)
    if "Replace" in by_type and by_type.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        mark = by_type["Replace"].get("pattern", {}).get("String")
        if isinstance(mark, str) and by_type["Replace"].get("content") == " ":
            return Pieces("space", mark, by_type.get("Strip", {}).get("start", 0) > 0)
    return None
