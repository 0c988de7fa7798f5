"""The contract between the engine and whatever computes: load a model, run one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pagoda.arch.lora import AdapterWeights
from pagoda.types import Image, StepPlan, StepResult

Progress = Callable[[str, float], None]
"""Called while loading with a phase ("weights", ...) and the share of it that is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine asks of an executor. None means: choose what fits.

    `memory_share` is the share of the machine's (CPU: free; GPU: total) memory that weights, cache and activations
    may use together; None lets the executor take what it sensibly can. `dtype` is the type of float computation
    where a backend has a choice ("auto", "float32", "float16", "bfloat16"). `quantization` "int8" or "int4" makes 8 or
    4 bits of float matrices while they are loaded; anything else leaves the weights as they are stored.
    `kv_cache_dtype` is the option of that name; arch.memory.kv_type says what it means on a CPU. `reserved_bytes` of
    the memory that looks free is promised to somebody else. `enforce_eager`: no CUDA graphs. `attention_backend`: the
    option of that name, for GPUs.
    `tensor_parallel_size` GPUs share the model: of this machine, or with `distributed_executor_backend` "ray" of a Ray
    cluster; each process opens the model by its path, as `load_format` and `mmproj` say. `max_loras` adapters, of rank
    `max_lora_rank` at most, are there at once. `kept_states` is how many states of prefixes may be kept, of models that
    have a state beside the cache.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    memory_share: float | None = None
    kv_cache_bytes: int | None = None
    num_blocks: int | None = None
    threads: int | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    reserved_bytes: int = 0
    enforce_eager: bool = False
    attention_backend: str | None = None
    tensor_parallel_size: int = 1
    distributed_executor_backend: str = "mp"
    load_format: str = "auto"
    max_loras: int = 0
    max_lora_rank: int = 16
    mmproj: str | None = None
    kept_states: int = 0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was measured while loading: not configuration.

    `steps_in_flight` 2: a step may be launched while the one before runs, and its plan is copied by then.
    `kept_states` places for states of prefixes (`StepPlan.kept`) come behind those of the `Limits.max_num_seqs` slots.
    """

    num_blocks: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    device: str  # such as "cpu (avx2, 2 threads)"
    steps_in_flight: int = 1
    kept_states: int = 0


class Pending(Protocol):
    def wait(self) -> StepResult:
        """Block until the step is done. Raises EngineError when the step as a whole failed.

        The result is good until the next step is launched.
        """
        ...


class Executor(Protocol):
    """Runs steps of one loaded model. Not thread-safe: one caller, at most `capacity.steps_in_flight` at once."""

    @property
    def capacity(self) -> Capacity: ...

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step, and return: what takes time comes beside, or in `wait`, since others are told meanwhile.

        The plan's arrays must stay unchanged until `wait` returns.
        """
        ...

    def encoded(self, image: Image, most_s: float) -> bool:
        """Whether a step can take an image's vectors at once, after encoding it for about so long if it could not.

        With `most_s` 0 nothing is encoded. How an image is cut changes no bit; a step that finds no vectors makes them.
        """
        ...

    def prepare(self) -> bool:
        """Do a part, of well under a second, of what makes later steps faster; False once nothing is left of it.

        Called with no step in flight.
        """
        ...

    def adapt(self, place: int, weights: AdapterWeights) -> None:
        """Put an adapter in a place, below `Limits.max_loras`, instead of the one there, which no step in flight uses.

        MemoryShort where there is no memory for it.
        """
        ...

    def close(self) -> None: ...


class Done:
    """A Pending whose result is already there."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class Due:
    """A Pending that computes when it is waited for."""

    def __init__(self, compute: Callable[[], StepResult]) -> None:
        self._compute = compute

    def wait(self) -> StepResult:
        return self._compute()
