"""The process that tries grammars, `python -m pagoda.engine.grammar_worker`: it may die of one, nobody else does."""

from __future__ import annotations

import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from pagoda.engine.messages import Verdict, frame
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


def receive(source: BinaryIO) -> bytes | None:
    """The next frame; None at the end."""
    size = source.read(4)
    return source.read(int.from_bytes(size, "big")) if len(size) == 4 else None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = receive(sys.stdin.buffer)
    if first is None:
        return
    vocabulary = Vocabulary(*msgspec.msgpack.decode(first, type=tuple[list[bytes], list[int], list[int]]))
    while (message := receive(sys.stdin.buffer)) is not None:
        # Time on the processor, not on the clock: the signal's default is to end the process.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        verdict = judge(vocabulary, msgspec.msgpack.decode(message, type=str))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(frame(verdict))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
