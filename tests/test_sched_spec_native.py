"""Speculation on the native executor: the same tokens and log-probabilities, in fewer steps where text repeats."""

from __future__ import annotations

from typing import Any

import pytest

from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.options.speculation import Speculation
from pagoda.sched.stats import SchedulerStats
from pagoda.text.tokenizer import load_tokenizer
from pagoda.types import Delta, Request, SamplingParams, TokenLogprob
from pagoda.weights.open import open_source

ALWAYS = Speculation(num_tokens=6, lookup_max=4, lookup_min=1, always=True)
LIST = "apple, banana, cherry, date, elderberry, fig, grape, "
PROMPTS = {
    "list": f"The same list, again and again: {LIST}{LIST}{LIST}apple, banana,",
    "count": "1 one, 2 two, 3 three, 1 one, 2 two, 3 three, 1 one, 2 two, 3 three, 1 one,",
    "free": "The night was dark, and the old house on the hill",
}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 3},
    "seeded": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 11, "logprobs": 1},
    "biased": {"temperature": 1.0, "seed": 5, "logit_bias": {260: 2.0}, "logprobs": 0},
    "penalized": {"temperature": 0.7, "seed": 5, "repetition_penalty": 1.1},
}

Answers = dict[str, tuple[list[int], list[TokenLogprob]]]


@pytest.fixture(scope="module")
def requests(smollm2_path: str) -> list[Request]:
    source = open_source(smollm2_path)
    tokenizer = load_tokenizer(smollm2_path, source.metadata)
    source.close()
    return [
        Request(
            request_id=f"{prompt} {kind}",
            prompt_token_ids=tokenizer.encode(text),
            params=SamplingParams(**{"seed": 0, "max_tokens": 48, "ignore_eos": True, **params}),
        )
        for prompt, text in PROMPTS.items()
        for kind, params in PARAMS.items()
    ]


def run(
    path: str, requests: list[Request], speculation: Speculation | None, *, together: bool
) -> tuple[Answers, int, SchedulerStats]:
    core = EngineCore(EngineConfig(model=path, num_blocks=128, max_model_len=512, speculation=speculation))
    answers: Answers = {request.request_id: ([], []) for request in requests}
    for batch in [requests] if together else [[request] for request in requests]:
        for request in batch:
            core.add(request)
        while core.has_work:
            for delta in core.step():
                _hear(answers, delta)
    stats = core.stats()
    core.close()
    return answers, stats.steps, stats.scheduler


def _hear(answers: Answers, delta: Delta) -> None:
    assert delta.error is None
    tokens, logprobs = answers[delta.request_id]
    tokens += delta.token_ids
    logprobs += delta.logprobs or []


def test_tokens_and_logprobs_are_the_same_bit_for_bit(smollm2_path: str, requests: list[Request]) -> None:
    plain, _, _ = run(smollm2_path, requests, None, together=True)
    for together in (True, False):
        drafting, steps, stats = run(smollm2_path, requests, ALWAYS, together=together)
        for name, answer in plain.items():
            assert drafting[name] == answer, name
        share = stats.spec_decode_num_accepted_tokens / stats.spec_decode_num_draft_tokens
        print(f"{stats.spec_decode_num_draft_tokens} drafts, {share:.0%} right, {steps} steps")
        assert stats.spec_decode_num_draft_tokens > 100


def test_a_list_that_goes_on_takes_fewer_steps(smollm2_path: str, requests: list[Request]) -> None:
    chosen = [request for request in requests if request.request_id == "list greedy"]
    plain, plain_steps, _ = run(smollm2_path, chosen, None, together=False)
    drafting, steps, stats = run(smollm2_path, chosen, ALWAYS, together=False)
    share = stats.spec_decode_num_accepted_tokens / stats.spec_decode_num_draft_tokens
    print(f"{share:.0%} of the drafts right, {steps} steps for {plain_steps}")
    assert drafting == plain and steps < plain_steps / 2
