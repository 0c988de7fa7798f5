"""From words that must not come to the runs of tokens that spell them."""

from __future__ import annotations

import msgspec

from pagoda.text.tokenizer import Tokenizer
from pagoda.types import SamplingParams


def with_bad_words(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The parameters with the tokens of their `bad_words`: each as it begins a text, and as it stands behind a space.

    Blanks before a word do not count, as in vLLM; a word of blanks only is taken as it is.
    """
    if not params.bad_words:
        return params
    runs = list(params.bad_words_token_ids)
    for word in params.bad_words:
        bare = word.lstrip()
        for text in (bare, " " + bare) if bare else (word,):
            runs.append(tuple(tokenizer.encode(text, add_special_tokens=False)))
    return msgspec.structs.replace(params, bad_words=(), bad_words_token_ids=tuple(dict.fromkeys(filter(None, runs))))
