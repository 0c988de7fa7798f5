"""The process that tries grammars, `python -m pagoda.engine.grammar_worker`: it may die of one, nobody else does."""

from __future__ import annotations

import sys

import msgspec

from pagoda.engine.messages import Verdict
from pagoda.engine.worker import answer_each, limit_memory, receive
from pagoda.errors import BadRequest
from pagoda.text.matcher import Vocabulary, translated

CPU_S = 1.0
MEMORY_BYTES = 1 << 30


def judge(vocabulary: Vocabulary, text: str) -> Verdict:
    """Translate, compile, and ask once what may come first."""
    try:
        text = translated(text)
        matcher = vocabulary.compile(text)
    except BadRequest as error:
        return Verdict(error=error.message)
    if not matcher.mask().any():
        return Verdict(error=matcher.error or "nothing can match it")
    return Verdict(text)


def main() -> None:
    limit_memory(MEMORY_BYTES)
    first = receive(sys.stdin.buffer)
    if first is None:
        return
    vocabulary = Vocabulary(*msgspec.msgpack.decode(first, type=tuple[list[bytes], list[int], list[int]]))
    answer_each(lambda message: judge(vocabulary, msgspec.msgpack.decode(message, type=str)), CPU_S)


if __name__ == "__main__":
    main()
