"""Speculation with a draft model: the same answers bit for bit, its memory counted, unfit models refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine_tiny
import pytest

from pagoda.engine.core import EngineCore
from pagoda.engine.draft_model import DraftModel
from pagoda.errors import ConfigError, ModelError
from pagoda.options.config import Options
from pagoda.options.engine_config import EngineConfig
from pagoda.options.speculation import Speculation, speculation_from
from pagoda.sched.draft import Speculator
from pagoda.sched.stats import SchedulerStats
from pagoda.types import Request, SamplingParams, TokenLogprob

GREEDY: dict[str, Any] = {"temperature": 0.0, "logprobs": 2}
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "seed": 11, "logprobs": 0}
PARAMS = (GREEDY, SEEDED, {**SEEDED, "logit_bias": {40: 3.0}}, {**SEEDED, "repetition_penalty": 1.2})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return engine_tiny.write(tmp_path_factory.mktemp("tiny"))


def requests(count: int = 8, tokens: int = 40) -> list[Request]:
    return [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=[2 + (7 * i + 3 * j * j) % 250 for j in range(5 + 21 * (i % 4))],
            params=SamplingParams(**{"seed": i, "max_tokens": tokens, "ignore_eos": True, **PARAMS[i % len(PARAMS)]}),
        )
        for i in range(count)
    ]


Answers = dict[str, tuple[list[int], list[TokenLogprob]]]


def run(
    model: str, wanted: list[Request], speculation: Speculation | None, cancel: str = "", **config: Any
) -> tuple[Answers, int, SchedulerStats]:
    core = EngineCore(EngineConfig(model=model, threads=2, speculation=speculation, **config))
    answers: Answers = {request.request_id: ([], []) for request in wanted}
    for request in wanted:
        core.add(request)
    while core.has_work:
        for delta in core.step():
            assert delta.error is None
            answers[delta.request_id][0].extend(delta.token_ids)
            answers[delta.request_id][1].extend(delta.logprobs or [])
        if cancel and len(answers[cancel][0]) > 10:
            core.cancel(cancel)
    stats = core.stats()
    core.close()
    return answers, stats.steps, stats.scheduler


def with_model(path: str, quantization: str | None = None, tokens: int = 4) -> Speculation:
    return Speculation(num_tokens=tokens, always=True, model=path, quantization=quantization)


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_answers_are_the_same_bit_for_bit(tiny: str, quantization: str | None) -> None:
    plain, plain_steps, _ = run(tiny, requests(), None)
    drafted, steps, stats = run(tiny, requests(), with_model(tiny, quantization))
    assert drafted == plain
    right = stats.spec_decode_num_accepted_tokens / stats.spec_decode_num_draft_tokens
    print(f"{steps} steps in place of {plain_steps}, {right:.0%} of the drafts right")
    assert stats.spec_decode_num_draft_tokens > 100
    if quantization is None:
        assert right == 1, "the model itself, drawing with the same seeds, is never wrong"
    else:
        assert 0.05 < right < 1


def test_each_step_gives_a_token_more_than_its_drafts(tiny: str) -> None:
    plain, plain_steps, _ = run(tiny, requests(count=3), None)
    drafted, steps, _ = run(tiny, requests(count=3), with_model(tiny))
    assert drafted == plain
    assert plain_steps >= 40 and steps <= 11, "a prompt, then 39 tokens by five"


def test_preempted_cancelled_and_resumed_streams(tiny: str) -> None:
    """A cache too small for all: streams lose their place and come back; another leaves; one has a past."""
    wanted = requests(count=10, tokens=60)
    past = wanted[4].prompt_token_ids[:3]
    wanted[4] = Request(request_id="r4", prompt_token_ids=[9, 8, 7], output_token_ids=past, params=wanted[4].params)
    room = {"num_blocks": 24, "max_num_seqs": 6, "max_num_batched_tokens": 48, "max_model_len": 200}
    plain, _, plain_stats = run(tiny, wanted, None, cancel="r2", **room)
    drafted, _, stats = run(tiny, wanted, with_model(tiny, "int8"), cancel="r2", **room)
    assert plain_stats.preemptions > 0 and stats.preemptions > 0
    for name in drafted.keys() - {"r2"}:
        assert drafted[name] == plain[name], name
    both = min(len(plain["r2"][0]), len(drafted["r2"][0]))
    assert drafted["r2"][0][:both] == plain["r2"][0][:both]


def test_a_draft_model_as_slow_as_the_model_is_given_up(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It guesses right each time, and still costs more than it gives: here a second for each round."""
    observe = Speculator.observe
    monkeypatch.setattr(
        Speculator, "observe", lambda self, rounds: observe(self, [(tokens, 1.0) for tokens, _ in rounds])
    )
    plain, _, _ = run(tiny, requests(2, 150), None)
    drafted, _, stats = run(tiny, requests(2, 150), Speculation(num_tokens=4, model=tiny))
    assert drafted == plain
    assert 0 < stats.spec_decode_num_draft_tokens < 150


def test_streams_beyond_the_draft_models_context_go_on_without(tiny: str, tmp_path: Path) -> None:
    short = Path(engine_tiny.write(tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))
    wanted = requests(count=4, tokens=80)
    plain, _, _ = run(tiny, wanted, None)
    drafted, _, stats = run(tiny, wanted, with_model(str(short)))
    assert drafted == plain
    assert 0 < stats.spec_decode_num_draft_tokens < 200


def test_streams_go_on_where_it_fails(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, _ = run(tiny, requests(), None)
    guess, calls = DraftModel._guess, 0

    def failing(self: DraftModel, *given: Any) -> None:
        nonlocal calls
        calls += 1
        guess(self, *given)
        if calls in (3, 7):
            raise RuntimeError("out of luck")

    monkeypatch.setattr(DraftModel, "_guess", failing)
    drafted, _, stats = run(tiny, requests(), with_model(tiny))
    assert drafted == plain and calls > 7 and stats.spec_decode_num_draft_tokens > 50


def test_its_memory_is_counted(tiny: str) -> None:
    config = EngineConfig(model=tiny, threads=1, num_blocks=40, speculation=None)
    alone = EngineCore(config)
    info, both = alone.info, EngineCore(EngineConfig(model=tiny, num_blocks=40, speculation=with_model(tiny, "int8")))
    assert both.info.num_blocks == info.num_blocks == 40
    assert both.info.kv_bytes == 2 * info.kv_bytes
    assert info.weight_bytes < both.info.weight_bytes < 2 * info.weight_bytes
    alone.close()
    both.close()


def test_another_vocabulary_is_refused(tiny: str, tmp_path: Path) -> None:
    other = Path(engine_tiny.write(tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"'[ab]' to the draft model and '[ab]' to the model") as error:
        EngineCore(EngineConfig(model=tiny, speculation=with_model(str(other))))
    assert "same family" in error.value.remedy
    with pytest.raises(ModelError):
        EngineCore(EngineConfig(model=tiny, speculation=with_model(str(tmp_path / "nothing"))))


def test_a_vocabulary_of_another_size_is_refused(tiny: str, smollm2_path: str) -> None:
    with pytest.raises(ConfigError, match="258 tokens, the model 49152"):
        EngineCore(EngineConfig(model=smollm2_path, speculation=with_model(tiny)))


def test_the_option() -> None:
    given = {"model": "/m", "num_speculative_tokens": 3, "quantization": "int4"}
    assert Options(speculative_config=given).engine_config("m").speculation == Speculation(
        num_tokens=3, model="/m", quantization="int4"
    )
    assert speculation_from({"method": "draft_model", "model": "/m"}) == Speculation(num_tokens=4, model="/m")
    assert speculation_from({"model": "/m", "num_speculative_tokens": 0}) is None


@pytest.mark.parametrize(
    "given, needle",
    [
        ({"method": "draft_model"}, "path of a draft model"),
        ({"model": ""}, "path of a draft model"),
        ({"model": "/m", "quantization": "fp4"}, "fp4"),
        ({"model": "/m", "prompt_lookup_max": 3}, "prompt_lookup_max"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_name(given: dict[str, object], needle: str) -> None:
    with pytest.raises(ConfigError, match=needle) as error:
        speculation_from(given)
    assert '"model": PATH' in error.value.remedy
