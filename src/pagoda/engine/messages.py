"""What the server and the engine process say to each other: typed messages in length-prefixed msgpack frames."""

from __future__ import annotations

import msgspec

from pagoda.errors import PagodaError
from pagoda.sched.stats import SchedulerStats
from pagoda.types import Delta, Request

MAX_FRAME_BYTES = 256 << 20
_PREFIX_BYTES = 4


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded, and what fits. `max_model_len` may be less than the model could do: see `model_max_len`."""

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    model_max_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    device: str
    weight_types: str  # largest share first, such as "Q4_1, Q8_0"
    eos_token_ids: tuple[int, ...]
    load_s: float
    task: str = "generate"  # or "embed", "score": what a request gives
    width: int = 0  # of the vector, or how many scores there are
    sees: bool = False  # it takes images


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's counters and the engine's own. `steps` grows by one with each step, also a failed one."""

    scheduler: SchedulerStats
    steps: int = 0
    last_step_s: float = 0.0


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Picture(msgspec.Struct, frozen=True, tag=True):
    """The pixels of an image, which requests that follow refer to by its digest."""

    digest: bytes
    pixels: bytes


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Images that no request needs any more."""

    digests: list[bytes]


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asked of an engine without work: a Step without deltas is the answer."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End now; whoever wants to drain waits before sending it."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    phase: str
    share: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: ModelInfo


class Step(msgspec.Struct, frozen=True, tag=True):
    deltas: list[Delta]
    stats: EngineStats


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """Loading ended with an error of ours: `kind` is the class in `pagoda.errors`."""

    kind: str
    message: str
    remedy: str
    exit_code: int


class Verdict(msgspec.Struct, frozen=True):
    """Of the process that tries grammars: one as the engine can compile it, or what is wrong with it."""

    grammar: str = ""
    error: str = ""


ToEngine = Submit | Cancel | Picture | Forget | Ping | Shutdown
FromEngine = Loading | Ready | Step | LoadFailed


class ProtocolError(PagodaError):
    """The other side sent bytes that are no message of ours."""


def frame(message: object) -> bytes:
    """Encode one message with its length in front."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_PREFIX_BYTES, "big") + body


class Framer:
    """Cuts received bytes into frames. Memory grows with bytes that came, never with a length that was claimed."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """A frame has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes; every frame that is complete now. Raises ProtocolError for a length over the limit."""
        self._buffer += data
        frames = []
        start = 0
        while len(self._buffer) - start >= _PREFIX_BYTES:
            body = start + _PREFIX_BYTES
            length = int.from_bytes(self._buffer[start:body], "big")
            if length > self._max_frame_bytes:
                raise ProtocolError(f"a frame claims {length} bytes, over the limit of {self._max_frame_bytes}")
            if len(self._buffer) - body < length:
                break
            start = body + length
            frames.append(bytes(memoryview(self._buffer)[body:start]))  # one copy; frames may be large
        del self._buffer[:start]
        return frames
