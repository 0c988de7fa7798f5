"""The LoRA adapters of `LLM`'s calls, as vLLM's users name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pagoda.engine.llm_inputs import Encoded
from pagoda.errors import BadRequest
from pagoda.weights.lora import find_adapter


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter: any name and number, and the path of its folder. It is told from others by its files alone."""

    lora_name: str
    lora_int_id: int
    lora_path: str


LoraRequests = LoRARequest | Sequence[LoRARequest | None] | None


def adapters_of(prompts: Sequence[Encoded], given: LoraRequests) -> list[Encoded]:
    """The prompts with their adapters: one for all, or a list of as many. ModelError for one that is not there."""
    each = [given] * len(prompts) if given is None or isinstance(given, LoRARequest) else list(given)
    if len(each) != len(prompts):
        raise BadRequest(f"{len(prompts)} prompts came with {len(each)} lora_requests", param="lora_request")
    found = {one: find_adapter(one.lora_name, one.lora_path) for one in set(each) if one is not None}
    pairs = zip(prompts, each, strict=True)
    return [prompt if one is None else replace(prompt, adapter=found[one]) for prompt, one in pairs]
