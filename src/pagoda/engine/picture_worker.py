"""The process that decodes pictures, `python -m pagoda.engine.picture_worker`: it may die of one, nobody else does."""

from __future__ import annotations

import msgspec

from pagoda.engine.worker import answer_each, limit_memory
from pagoda.errors import BadRequest
from pagoda.media.decode import decode
from pagoda.media.task import TOO_MUCH, Failed, Pixels, Task

CPU_S = 20.0
MEMORY_BYTES = 3 << 30


def answer(message: bytes) -> Pixels | Failed:
    try:
        return decode(msgspec.msgpack.decode(message, type=Task))
    except BadRequest as error:
        return Failed(error.message)
    except MemoryError:
        return Failed(TOO_MUCH)


def main() -> None:
    limit_memory(MEMORY_BYTES)
    answer_each(answer, CPU_S)


if __name__ == "__main__":
    main()
