"""What a scheduler is told: how much there is of everything, and what kind of model it plans for."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.arch.vision_spec import Vision
from pagoda.options.speculation import Speculation
from pagoda.sched.pooled import PoolKind


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """`step_time_target_s`: how long a step may take that has running streams; None: only the token budget counts.

    `pooling`: how each request becomes a vector; None: it generates. With `whole_prompts` no prompt is cut: one that
    is over the token budget has a step of its own. A `recurrent` model has places for `kept_states`.
    """

    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    prefix_caching: bool = True
    step_time_target_s: float | None = None
    speculation: Speculation | None = None
    pooling: PoolKind | None = None
    whole_prompts: bool = False
    vision: Vision | None = None
    max_loras: int = 0
    recurrent: bool = False
    kept_states: int = 0
