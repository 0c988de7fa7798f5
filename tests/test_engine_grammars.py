"""Grammars in the engine: masks, replay after a death, company, drafts, and grammars that are wrong or too large."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import engine_tiny
import pytest

from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.options.speculation import Speculation
from pagoda.text.matcher import load_vocabulary
from pagoda.text.tokenizer import Tokenizer, load_tokenizer
from pagoda.types import Delta, Request, SamplingParams

EOS = 1
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def grammar(lark: str | None = None, schema: object = None) -> str:
    one = {"lark_grammar": lark} if lark is not None else {"json_schema": schema}
    return json.dumps({"grammars": [one]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return engine_tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def core(request: pytest.FixtureRequest, model: str) -> Iterator[EngineCore]:
    made = EngineCore(EngineConfig(model=model, device=request.param, num_blocks=256, threads=1))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Tokenizer:
    return load_tokenizer(model, {})


def asked(name: str, text: str, **params: Any) -> Request:
    given = {"seed": 1, "max_tokens": 100, "temperature": 1.0, "grammar": text, **params}
    return Request(request_id=name, prompt_token_ids=[40, 41, 42], params=SamplingParams(**given), eos_token_ids=(EOS,))


def run(core: EngineCore, *requests: Request) -> dict[str, Delta]:
    """The end of each request, with all its tokens."""
    told: dict[str, Delta] = {}
    for request in requests:
        core.add(request)
    while core.has_work:
        for delta in core.step():
            before = told.get(delta.request_id)
            delta.token_ids = (before.token_ids if before else []) + delta.token_ids
            told[delta.request_id] = delta
    return told


def test_random_weights_write_what_the_schema_says(core: EngineCore, tokenizer: Tokenizer) -> None:
    text = grammar(schema={**PERSON, "x-guidance": {"whitespace_flexible": False}})
    told = run(core, *(asked(f"{seed}", text, seed=seed) for seed in range(10)))
    for delta in told.values():
        found = json.loads(tokenizer.decode(delta.token_ids))
        assert list(found) == ["name", "age"] and len(found["name"]) <= 12 and found["age"] <= 150
        assert (delta.finish_reason, delta.stop_reason) == ("stop", None)
    assert len({tuple(delta.token_ids) for delta in told.values()}) == 10


def test_company_and_a_grammar_seen_before_change_nothing(core: EngineCore) -> None:
    text = grammar(schema=PERSON)
    alone = run(core, asked("a", text, seed=5))["a"].token_ids
    together = run(core, asked("b", grammar("start: /[a-f]{30}/")), asked("c", ""), asked("a", text, seed=5))
    assert together["a"].token_ids == alone
    assert len(together["b"].token_ids) == 30 and together["b"].finish_reason == "stop"


@pytest.mark.parametrize("before", [1, 7, 20])
def test_a_resumed_request_goes_on_where_it_was_in_its_grammar(core: EngineCore, before: int) -> None:
    whole = run(core, asked("whole", grammar(schema=PERSON), seed=3))["whole"].token_ids
    resumed = asked("resumed", grammar(schema=PERSON), seed=3)
    resumed.output_token_ids = whole[:before]
    assert run(core, resumed)["resumed"].token_ids == whole[before:]


def test_the_output_may_end_only_where_the_grammar_may(core: EngineCore, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        delta = run(core, asked("a", grammar("start: /(ab)+/"), seed=seed, logit_bias={EOS: 3.0}))["a"]
        assert re.fullmatch("(ab)+", tokenizer.decode(delta.token_ids)) and delta.token_ids[-1] == EOS
    endless = run(core, asked("a", grammar("start: /(ab)+/"), ignore_eos=True, max_tokens=9, logit_bias={EOS: -99.0}))
    assert (tokenizer.decode(endless["a"].token_ids), endless["a"].finish_reason) == ("ababababa", "length")


def test_allowed_tokens_hold_beside_a_grammar(core: EngineCore, tokenizer: Tokenizer) -> None:
    allowed = tuple(tokenizer.encode("ab", add_special_tokens=False))
    delta = run(core, asked("a", grammar("start: /[a-z]{20}/"), allowed_token_ids=allowed))["a"]
    assert set(tokenizer.decode(delta.token_ids)) <= {"a", "b"} and len(delta.token_ids) == 20


@pytest.mark.parametrize("text", [grammar("start: nothing"), grammar("start: /(/"), "{", grammar(schema={"type": "x"})])
def test_a_wrong_grammar_ends_its_request_only(core: EngineCore, text: str) -> None:
    told = run(core, asked("wrong", text), asked("right", grammar("start: /[a-f]{5}/")))
    assert told["wrong"].finish_reason == "error" and told["wrong"].error
    assert told["right"].finish_reason == "stop"


def test_a_grammar_that_grows_too_complex_ends_its_request_only(core: EngineCore) -> None:
    hostile = grammar("start: /((a|b|ab|ba)*(a|ab)(a|b){0,900}x?){0,900}[ab]{900}/")
    told = run(core, asked("hostile", hostile, max_tokens=200), asked("right", grammar("start: /[a-f]{5}/")))
    assert told["right"].finish_reason == "stop"
    assert told["hostile"].finish_reason == "error"
    assert "cannot be followed any further: lexer error: too many" in str(told["hostile"].error)


def test_cancelled_while_its_grammar_is_prepared(core: EngineCore) -> None:
    core.add(asked("gone", grammar("start: /[a-f]{17}/")))
    core.cancel("gone")
    assert not core.has_work and not run(core)


def test_drafts_never_leave_the_grammar(model: str) -> None:
    always = Speculation(num_tokens=6, lookup_max=4, lookup_min=1, always=True)
    text = grammar("start: /(abc,abd,){20}/")
    answers = []
    for speculation in (None, always):
        core = EngineCore(EngineConfig(model=model, num_blocks=256, threads=1, speculation=speculation))
        answers.append(run(core, asked("a", text, max_tokens=200))["a"].token_ids)
        core.close()
    assert answers[0] == answers[1] and len(answers[0]) == 160


ORDER = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 8},
        "delivery_address": {"enum": ["at home", "in the office"]},
        "priority_level": {"type": "integer", "maximum": 5, "minimum": 1},
        "gift_wrapping_wanted": {"type": "boolean"},
    },
    "required": ["customer_name", "delivery_address", "priority_level", "gift_wrapping_wanted"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def test_forced_text_is_tried_ahead_and_changes_no_token(smollm2_path: str) -> None:
    """It takes fewer steps, whatever else is sampled or biased; what the model cuts otherwise is dropped."""
    always = Speculation(num_tokens=8, lookup_max=4, lookup_min=2, always=True)
    told, steps = [], []
    for speculation in (None, always):
        given = EngineConfig(model=smollm2_path, num_blocks=256, max_model_len=512, threads=1, speculation=speculation)
        core = EngineCore(given)
        requests = [
            asked("plain", grammar(schema=ORDER), seed=1),
            asked("cold", grammar(schema=ORDER), temperature=0.0),
            asked("hot", grammar(schema=ORDER), seed=2, temperature=3.0, logprobs=2, logit_bias={28: 2.0, 34: 5.0}),
            asked("cut", grammar(schema=ORDER), seed=3, max_tokens=9),
            asked("ends", grammar('start: "abcdefgh"'), seed=4),
            asked("penal", grammar(schema=ORDER), seed=5, presence_penalty=1.5),
        ]
        ends = {}
        before = core.stats().steps
        for each in requests:
            delta = run(core, each)[each.request_id]
            ends[each.request_id] = (delta.token_ids, delta.finish_reason, delta.stop_reason)
        together = run(core, *requests)
        assert {name: (each.token_ids, each.finish_reason, each.stop_reason) for name, each in together.items()} == ends
        told.append(ends)
        steps.append(core.stats().steps - before)
        accepted = core.stats().scheduler.spec_decode_num_accepted_tokens
        assert (accepted > 50) == (speculation is not None)
        core.close()
    assert told[0] == told[1] and steps[1] < 0.8 * steps[0], steps


def test_masks_behind_drafts_are_those_of_their_turn(model: str, tokenizer: Tokenizer) -> None:
    vocabulary = load_vocabulary(tokenizer, 300, (EOS,))
    text = tokenizer.encode("abcabd", add_special_tokens=False)
    whole, behind = vocabulary.compile(grammar("start: /abc(abd)?/")), []
    for count in range(len(text) + 1):
        one = whole.copy()
        one.advance(text[:count])
        behind.append(one.mask().tolist())
    for _ in range(2):  # looking ahead leaves no trace
        assert [mask.tolist() for mask in whole.masks(text[:5])] == behind[:6]
        assert [mask.tolist() for mask in whole.masks(text)][:6] == behind[:6]  # what follows the end does not matter
        assert not any(mask.any() for mask in whole.masks([*text[:2], text[0], text[1]])[3:])
        assert whole.forced(9) == text[:3] and whole.forced(2) == text[:2]


@pytest.mark.alone
def test_the_first_grammar_of_an_engine_does_not_hold_up_a_stream_for_long(smollm2_path: str) -> None:
    core = EngineCore(EngineConfig(model=smollm2_path, num_blocks=400, speculation=None))
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    core.add(asked("runs", "", max_tokens=4000))
    for _ in range(20):
        core.step()
    core.add(asked("asks", "", max_tokens=4, grammar=grammar(schema=schema)))
    told, longest_s, before = False, 0.0, time.perf_counter()
    while not told:
        told = any(delta.request_id == "asks" for delta in core.step())
        now = time.perf_counter()
        longest_s, before = max(longest_s, now - before), now
    core.close()
    assert longest_s < 0.2  # 65 ms of work are done in one call; 160 ms were
