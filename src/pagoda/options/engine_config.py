"""The part of the options that the engine process gets, resolved."""

from __future__ import annotations

import msgspec

from pagoda.options.speculation import Speculation
from pagoda.options.tasks import Task
from pagoda.types import Adapter


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process needs to know, resolved: the model is local, None means `auto` (choose what fits).

    `device`: "auto", "cpu" (native), "cuda", "reference" (numpy) or, for tests, "torch-cpu". `memory_share`: see
    `backend.base.Limits`. `reserved_bytes` of a CPU's free memory are for other engines that load at the same time.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    memory_share: float | None = None
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    enforce_eager: bool = False
    attention_backend: str | None = None
    num_blocks: int | None = None
    reserved_bytes: int = 0
    threads: int | None = None
    tensor_parallel_size: int = 1
    distributed_executor_backend: str = "mp"
    prefix_caching: bool = True
    step_time_target_s: float | None = None  # 0: no target
    speculation: Speculation | None = Speculation()
    task: Task = "auto"
    load_format: str = "auto"
    max_loras: int = 0
    max_lora_rank: int = 16
    adapters: tuple[Adapter, ...] = ()  # that are loaded with the model
    mmproj: str | None = None
