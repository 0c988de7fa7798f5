"""Token ids to text as they come: a character is shown once all of its bytes are there, and never taken back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from pagoda.text.tokenizer import Tokenizer

_MAX_PARTIAL_BYTES = 3


class Detokenizer:
    """The text of an output. All `add`s and the `finish` together give what decoding the ids at once gives.

    The prompt matters in two ways: after visible text the first token keeps its leading space, and a character that
    the prompt left unfinished is completed by the output. No text of the prompt itself is ever returned. The special
    tokens in `shown` are text like any other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids - shown if skip_special_tokens else frozenset[int]()
        self._token_bytes = tokenizer.token_bytes
        tail = self._tail(prompt_ids)
        self._strip = tokenizer.strip_first and not tail
        self._rest = _unfinished(tail)

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain after these further tokens."""
        if not self._hidden.isdisjoint(ids):
            ids = [i for i in ids if i not in self._hidden]
        raw = b"".join(map(self._token_bytes, ids))
        if self._strip and raw:
            self._strip = False
            raw = raw.removeprefix(b" ")
        if self._rest:
            raw = self._rest + raw
        text, used = codecs.utf_8_decode(raw, "replace", False)
        self._rest = raw[used:]
        return text

    def finish(self) -> str:
        """What an unfinished character at the end becomes: U+FFFD, or nothing."""
        rest, self._rest = self._rest, b""
        return rest.decode("utf-8", "replace")

    def _tail(self, prompt_ids: Sequence[int]) -> bytes:
        """The last visible bytes of the prompt: enough to hold any unfinished character, b"" if nothing shows."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id not in self._hidden:
                tail = self._tokenizer.token_bytes(token_id) + tail
            if len(tail) >= _MAX_PARTIAL_BYTES:
                break
        return tail


def _unfinished(tail: bytes) -> bytes:
    """The bytes at the end that begin a character and do not finish it."""
    for count in range(min(_MAX_PARTIAL_BYTES, len(tail)), 0, -1):
        if codecs.getincrementaldecoder("utf-8")("replace").decode(tail[-count:]) == "":
            return tail[-count:]
    return b""
