"""Measures a model in this process, without a server: how long a batch takes, and how much goes through."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.bench.prompts import Shape, about, from_file
from pagoda.bench.result import percentile
from pagoda.engine.beams import BeamSearchParams
from pagoda.engine.llm import LLM
from pagoda.engine.llm_adapters import LoRARequest
from pagoda.engine.llm_inputs import Prompt as Given
from pagoda.errors import ConfigError, EngineError
from pagoda.types import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, and how many tokens it shall give."""

    prompt: Given
    output_tokens: int
    adapter: LoRARequest | None = None


@dataclass(frozen=True, slots=True)
class Throughput:
    """What went through, and in which time."""

    elapsed_s: float
    requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def table(self) -> dict[str, Any]:
        """Under the names of vLLM's file."""
        return {
            "elapsed_time": self.elapsed_s,
            "num_requests": self.requests,
            "total_num_tokens": self.tokens,
            "requests_per_second": self.requests / self.elapsed_s,
            "tokens_per_second": self.tokens / self.elapsed_s,
        }


def made_up_ids(llm: LLM, shape: Shape, rng: random.Random) -> Iterator[Ask]:
    """Prompts without end, of token ids: their length is exact, and but for the prefixes no two begin alike."""
    tokenizer = llm.tokenizer
    size = min(tokenizer.vocab_size, llm.info.vocab_size)
    common = [i for i in range(size) if i not in tokenizer.special_ids]
    heads = [rng.choices(common, k=shape.prefix_tokens) for _ in range(shape.prefixes)]
    for head in itertools.cycle(heads):
        ids = rng.choices(common, k=about(shape.input_tokens, shape.spread, rng))
        yield Ask([*head, *ids], about(shape.output_tokens, shape.spread, rng))


def asks_of_file(llm: LLM, path: str, output_tokens: int, *, chat: bool) -> list[Ask]:
    """Its prompts: their text as it is, or as conversations through the model's template."""
    prompts = from_file(path, output_tokens)
    if not chat:
        return [Ask(prompt.text, prompt.output_tokens) for prompt in prompts]
    said = [prompt.messages or [{"role": "user", "content": prompt.text}] for prompt in prompts]
    return [Ask(llm.chat_prompt(messages), p.output_tokens) for messages, p in zip(said, prompts, strict=True)]


def check_room(llm: LLM, longest: int) -> None:
    room = llm.info.max_model_len
    if longest > room:
        raise ConfigError(
            f"prompt and answer are {longest} tokens, and the context holds {room}",
            remedy=f"Give --max-model-len {longest}, or ask for less with --input-len and --output-len",
        )


def latencies_s(
    llm: LLM,
    batch: Sequence[Ask],
    *,
    n: int,
    beams: bool,
    iterations: int,
    warmups: int,
    on_progress: Callable[[str, float], None],
) -> list[float]:
    """How long the same batch takes, again and again."""
    prompts, tokens = [ask.prompt for ask in batch], batch[0].output_tokens
    search = BeamSearchParams(beam_width=n, max_tokens=tokens, ignore_eos=True)
    took_s = []
    for done in range(warmups + iterations):
        began_s = time.perf_counter()
        if beams:
            llm.beam_search(prompts, search)
        else:
            _generate(llm, batch, n)
        took_s.append(time.perf_counter() - began_s)
        on_progress("warming up" if done < warmups else "measuring", (done + 1) / (warmups + iterations))
    return took_s[warmups:]


def latency_table(took_s: Sequence[float]) -> dict[str, Any]:
    """Under the names of vLLM's file."""
    ordered = sorted(took_s)
    return {
        "avg_latency": sum(took_s) / len(took_s),
        "latencies": list(took_s),
        "percentiles": {str(share): percentile(ordered, share) for share in PERCENTILES},
    }


def throughput(llm: LLM, asks: Sequence[Ask], *, n: int, show: bool) -> Throughput:
    """All at once, as fast as they go."""
    began_s = time.perf_counter()
    prompt_tokens, output_tokens = _generate(llm, asks, n, show)
    return Throughput(time.perf_counter() - began_s, len(asks), prompt_tokens, output_tokens)


def _generate(llm: LLM, asks: Sequence[Ask], n: int, show: bool = False) -> tuple[int, int]:
    """Tokens read and given; EngineError where one failed, for then the time means nothing."""
    params = [SamplingParams(n=n, temperature=1.0, ignore_eos=True, max_tokens=ask.output_tokens) for ask in asks]
    adapters = [ask.adapter for ask in asks]
    outputs = llm.generate([ask.prompt for ask in asks], params, use_tqdm=show, lora_request=adapters)
    answers = [answer for output in outputs for answer in output.outputs]
    if failed := [answer.error for answer in answers if answer.error]:
        raise EngineError(f"{len(failed)} of {len(answers)} answers failed: {failed[0]}")
    return sum(len(o.prompt_token_ids) for o in outputs), sum(len(a.token_ids) for a in answers)
