"""Configuration with the origin of each value."""

from __future__ import annotations

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process needs to know, resolved: the model is local, None means `auto` (choose what fits).

    `device`: "auto", "cpu" (native), "reference" (numpy) or "cuda". `memory_share`: see `backend.base.Limits`.
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
    num_blocks: int | None = None
    threads: int | None = None
    prefix_caching: bool = True
