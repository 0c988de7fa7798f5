"""Grammars in the engine: masks, replay after a death, company, drafts, and grammars that are wrong or too large."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import engine_tiny
import pytest

from pagoda.config import EngineConfig
from pagoda.engine.core import EngineCore
from pagoda.speculation import Speculation
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
