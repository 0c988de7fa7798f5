"""How much of the memory a draft model takes for its cache."""

from __future__ import annotations

from dataclasses import replace

from pagoda.arch.memory import blocks_for
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Limits
from pagoda.errors import ConfigError
from pagoda.options.speculation import Speculation
from pagoda.types import BLOCK_SIZE

_CACHE_TOKENS = 32768
CATCH_UP_TOKENS = 128
"""Most tokens that the draft model reads in one go: all streams wait for it meanwhile."""


def draft_limits(speculation: Speculation, limits: Limits, spec: ModelSpec) -> tuple[Limits, int]:
    """The limits of a draft model with this spec beside a model with these, and its number of cache blocks."""
    length = min(limits.max_model_len, spec.max_position)
    blocks = limits.num_blocks or min(limits.max_num_seqs * blocks_for(length), _CACHE_TOKENS // BLOCK_SIZE)
    own = replace(
        limits,
        max_model_len=min(length, blocks * BLOCK_SIZE),
        max_num_batched_tokens=min(limits.max_num_batched_tokens, max(CATCH_UP_TOKENS, limits.max_num_seqs)),
        num_blocks=blocks,
        kv_cache_bytes=None,
        quantization=speculation.quantization,
        tensor_parallel_size=1,
        max_loras=0,
    )
    return own, blocks


def check_speculation(speculation: Speculation | None, spec: ModelSpec) -> None:
    """ConfigError where drafts are asked for of a model that cannot try them."""
    if spec.recurrent and speculation is not None and speculation.asked_for:
        raise ConfigError(
            f"--speculative-config cannot work with {spec.model_type}: what its linear attention keeps of a request "
            "cannot be taken back where a draft is wrong",
            remedy="Leave --speculative-config out",
            param="speculative_config",
        )


def speculation_of(speculation: Speculation | None, spec: ModelSpec, steps_in_flight: int) -> Speculation | None:
    """Drafts need the tokens before them: where steps are launched ahead, only who asks for drafts gets them."""
    asked = speculation is not None and speculation.asked_for
    return speculation if asked or (steps_in_flight == 1 and not spec.recurrent) else None
