"""Which tokens may come next under a grammar: llguidance over our own tokenizer's bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import llguidance
import msgspec
import numpy as np
import numpy.typing as npt
from llguidance.gbnf_to_lark import any_to_lark

from pagoda.errors import BadRequest
from pagoda.text.tokenizer import Tokenizer, token_table

Mask = npt.NDArray[np.uint32]

_MAX_ERROR_CHARS = 400
# What one grammar may cost: about 20 ms to build its expressions, 4 ms and 2.5 ms in the worst step, 64 MB of states.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_items_in_row=20_000,
    max_lexer_states=32_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)

# Tokens of letters are allowed, or not, all at once where these fit: expressions such as \w+ take a fifth of the time.
# Each holds the one before, and all of them long words: else each step of [a-zA-Z ]{1,500} takes 320 us and not 17.
# The library's own four more gain nothing beside these, and making them held the GIL for as long again.
_WORD_SLICES = ("[a-z]{1,20}", "[a-zA-Z]{1,20}", "[a-zA-Z ]{1,20}")
_BETWEEN_S = 0.03


class _Tokens:
    """What llguidance reads of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special_ids: Sequence[int], eos: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.eos_token_id = eos
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class Vocabulary:
    """The tokens of a model by their bytes, b"" for ids that stand for no text.

    `encode` gives forced text the tokens that the model knows it by; without it they are the longest that fit.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        eos = list(eos_token_ids) or [len(tokens) - 1]
        wrapped = _Tokens(tokens, special_ids, eos[0], encode or (lambda text: self._all.greedy_tokenize(text)))
        # Both calls hold the GIL; between them streams go on, for a step or two: whoever waits for the GIL gets it at
        # once, but gives it up with the first call to the system.
        plain = llguidance.LLTokenizer(wrapped, n_vocab=len(tokens), eos_token=eos, slices=[])  # type: ignore[arg-type]
        time.sleep(_BETWEEN_S)
        self._all = plain.with_slices(list(_WORD_SLICES))
        self.size = len(tokens)

    def compile(self, grammar: str) -> Matcher:
        """Raises BadRequest, with the reason, for a grammar that is wrong or too large."""
        matcher = llguidance.LLMatcher(self._all, translated(grammar), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise BadRequest(reason(matcher.get_error()))
        return Matcher(matcher, self.size)


def load_vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
    """The tokenizer's tokens, as many as the model has; any of these and of its own ends an output."""
    return Vocabulary(
        token_table(tokenizer, vocab_size),
        sorted(i for i in tokenizer.special_ids if i < vocab_size),
        list(dict.fromkeys((*eos_token_ids, *tokenizer.eos_token_ids))),
        lambda text: tokenizer.encode(text, add_special_tokens=False, parse_special=False),
    )


def translated(text: str) -> str:
    """The same grammar with its GBNF as Lark."""
    if '"gbnf"' not in text:
        return text
    document = msgspec.json.decode(text)
    parts = [part for part in document["grammars"] if "gbnf" in part]
    if not parts:
        return text
    for part in parts:
        try:
            part["lark_grammar"] = any_to_lark(part.pop("gbnf"))
        except Exception as error:  # the translator raises whatever its author's code does
            raise BadRequest(f"the GBNF grammar cannot be read: {reason(str(error))}") from None
    return msgspec.json.encode(document).decode()


class Matcher:
    """The state of one output under its grammar.

    It never raises. Where the grammar grows too complex on the way no token is allowed any more and `error` says why.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    @property
    def error(self) -> str:
        return reason(self._matcher.get_error()) if self._matcher.is_error() else ""

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), 32 * self._words)

    def mask(self) -> Mask:
        """Bit i of word i // 32: token i may come next."""
        return self.masks()[0]

    def masks(self, drafts: Sequence[int] = ()) -> list[Mask]:
        """`mask`, and the same behind each of the drafts.

        A draft that is not allowed is followed by nothing, and so are those behind it.
        """
        out = np.zeros((1 + len(drafts), self._words), np.uint32)
        self._fill(out[0])
        taken = 0
        for place, draft in enumerate(drafts, 1):
            if self._matcher.is_error() or self._matcher.try_consume_tokens([draft]) != 1:
                break
            taken = place
            if self._matcher.is_stopped():
                break
            self._fill(out[place])
        if taken and not self._matcher.is_error():
            self._matcher.rollback(taken)
        return list(out)

    def _fill(self, mask: Mask) -> None:
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            mask.fill(0)

    def forced(self, most: int) -> list[int]:
        """The tokens of the text that must come next, as far as it is certain, and as they are usually cut."""
        if most < 1 or self._matcher.is_error():
            return []
        return list(self._matcher.compute_ff_tokens()[:most])

    def advance(self, token_ids: Sequence[int]) -> bool:
        """Take in what was sampled; True if the output is complete and nothing can follow."""
        self._matcher.consume_tokens(list(token_ids))
        return self._matcher.is_stopped() and not self._matcher.is_error()


def reason(error: str) -> str:
    """The library's text in one short line."""
    text = " ".join(error.replace("<non-verbose/>", "").split())[:_MAX_ERROR_CHARS]
    return "nothing can match it" if text == "NoExtensionBias" else text
