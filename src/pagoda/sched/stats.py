"""What a scheduler holds at this moment, and what it has done since the start."""

from __future__ import annotations

import msgspec


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of this moment, then counters since the start."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
