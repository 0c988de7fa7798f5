"""What a client sees of an output: its text, cut at stop strings."""

from __future__ import annotations

import msgspec

from pagoda.text.detokenizer import Detokenizer
from pagoda.text.stop_strings import StopStrings
from pagoda.text.tokenizer import Tokenizer
from pagoda.types import Delta, Request


class TextOutput:
    """Turns one request's deltas into deltas with text.

    Text that could still become a stop string is held back until that is decided or the output ends. When a stop
    string is complete, `feed` returns the last delta (finish_reason "stop", its tokens cut to those needed) and
    `finished` is True: the caller then cancels the request in the engine. The special tokens in `shown` are text,
    for whoever reads the answer by them.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request, shown: frozenset[int] = frozenset()) -> None:
        params = request.params
        before = [*request.prompt_token_ids, *request.output_token_ids]
        self._detokenizer = Detokenizer(tokenizer, before, params.skip_special_tokens, shown)
        self._stops = StopStrings(params.stop) if params.stop else None
        self._include_stop = params.include_stop_str_in_output
        self._eos_token_ids = frozenset(request.eos_token_ids)
        self._tokens_before_stops = params.min_tokens - len(request.output_token_ids)
        self._held = ""
        self.finished = False

    @property
    def cuts(self) -> bool:
        """Whether it may end the output before the engine does."""
        return self._stops is not None

    def feed(self, delta: Delta) -> Delta:
        """This very delta, with its text. After the end: an empty delta."""
        if self.finished:
            return Delta(request_id=delta.request_id)
        if self._stops is None and delta.finish_reason is None:
            delta.text = self._detokenizer.add(delta.token_ids)
            return delta
        shown = self._shown_ids(delta)
        if self._stops is None:
            text = self._detokenizer.add(shown)
            stopped = None
        else:
            text, stopped = self._until_stop(self._stops, shown)
        if stopped is None and delta.finish_reason is not None:
            rest = self._detokenizer.finish()
            if self._stops is not None and rest:
                more, stopped = self._match(self._stops, rest, len(shown))
                text += more
            else:
                text += rest
        if stopped is not None:
            return self._stopped(delta, text, *stopped)
        if delta.finish_reason is not None:
            self.finished = True
            text += self._held
        delta.text = text
        return delta

    def _shown_ids(self, delta: Delta) -> list[int]:
        """The delta's tokens without the one that only ends the request."""
        ids = delta.token_ids
        if delta.finish_reason != "stop" or not ids:
            return ids
        if isinstance(delta.stop_reason, int):
            return ids if self._include_stop else ids[:-1]
        return ids[:-1] if ids[-1] in self._eos_token_ids else ids

    def _until_stop(self, stops: StopStrings, ids: list[int]) -> tuple[str, tuple[str, int] | None]:
        """Text of these tokens, one after the other, to know at which of them a stop string ends."""
        out: list[str] = []
        for count, token_id in enumerate(ids, 1):
            piece = self._detokenizer.add((token_id,))
            if self._tokens_before_stops > 0:  # as min_tokens wants: this text can't stop the output
                self._tokens_before_stops -= 1
                out.append(piece)
                continue
            text, stopped = self._match(stops, piece, count)
            out.append(text)
            if stopped is not None:
                return "".join(out), stopped
        return "".join(out), None

    def _match(self, stops: StopStrings, piece: str, count: int) -> tuple[str, tuple[str, int] | None]:
        """What of this piece (and of the text held before) can be shown; the stop string, if one is complete."""
        match = stops.feed(piece)
        if match is not None:
            text = self._held + piece[: match.end]
            return (text if self._include_stop else text[: -len(match.string)]), (match.string, count)
        text = self._held + piece
        cut = len(text) - stops.held
        self._held = text[cut:]
        return text[:cut], None

    def _stopped(self, delta: Delta, text: str, stop: str, count: int) -> Delta:
        self.finished = True
        return msgspec.structs.replace(
            delta,
            text=text,
            token_ids=delta.token_ids[:count],
            logprobs=None if delta.logprobs is None else delta.logprobs[:count],
            finish_reason="stop",
            stop_reason=stop,
            error=None,
        )
