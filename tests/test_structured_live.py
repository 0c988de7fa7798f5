"""Structured output and forced calls with the default model, whose 135M parameters do neither by themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from api_fake import make_server, on_port
from pydantic import BaseModel, Field

from pagoda.engine.client import EngineClient
from pagoda.options.engine_config import EngineConfig
from pagoda.text.chat import load_chat_template
from pagoda.text.generation import load_generation_defaults
from pagoda.text.tokenizer import load_tokenizer
from pagoda.weights.open import open_source

ASK: list[Any] = [{"role": "user", "content": "Describe a person from a novel: name, age, job."}]


class Person(BaseModel):
    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=120)
    job: Literal["doctor", "sailor", "thief"]


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=30)
    days: int = Field(ge=1, le=14)


class Now(BaseModel):
    """The time."""

    zone: Literal["UTC", "CET"]


TOOLS: list[Any] = [openai.pydantic_function_tool(kind) for kind in (GetWeather, Now)]


@pytest.fixture(scope="module")
def url(smollm2_path: str) -> Iterator[str]:
    source = open_source(smollm2_path)
    engine = EngineClient(EngineConfig(model=smollm2_path, num_blocks=512, max_model_len=1024))
    server = make_server(
        engine,  # type: ignore[arg-type]
        names=("smollm2",),
        tokenizer=load_tokenizer(smollm2_path, source.metadata),
        chat_template=load_chat_template(smollm2_path, source.metadata),
        eos_token_ids=load_generation_defaults(smollm2_path, source.metadata).eos_token_ids,
    )
    source.close()
    with on_port(server, engine) as base:  # type: ignore[arg-type]
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0, timeout=120)


def content(client: openai.OpenAI, **more: Any) -> str:
    given = {"temperature": 1.0, "seed": 1, "max_tokens": 200, **more}
    reply = client.chat.completions.create(model="smollm2", messages=ASK, **given)
    assert reply.choices[0].finish_reason == "stop"
    return reply.choices[0].message.content or ""


def test_fifty_of_fifty_are_what_the_schema_says(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": Person.model_json_schema()}}
    reply = client.chat.completions.create(
        model="smollm2", messages=ASK, temperature=1.0, seed=7, n=50, max_tokens=200, response_format=schema
    )  # type: ignore[call-overload]
    texts = [choice.message.content or "" for choice in reply.choices]
    people = [Person.model_validate_json(text) for text in texts]
    assert len(people) == 50 and len(set(texts)) > 40


def test_parse_gives_the_model_of_pydantic(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model="smollm2", messages=ASK, response_format=Person, seed=3)
    assert isinstance(reply.choices[0].message.parsed, Person)
    with client.chat.completions.stream(model="smollm2", messages=ASK, response_format=Person, seed=3) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == reply.choices[0].message.parsed


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "[A-Z][a-z]{2,8} is [1-9][0-9]"},
        {"structured_outputs": {"regex": "[A-Z][a-z]{2,8} is [1-9][0-9]"}},
        {"structured_outputs": {"grammar": 'start: name " is " age\nname: /[A-Z][a-z]{2,8}/\nage: /[1-9][0-9]/'}},
        {"guided_grammar": 'root ::= name " is " [1-9] [0-9]\nname ::= [A-Z] [a-z] [a-z] [a-z]?'},
        {"response_format": {"type": "regex", "pattern": "[A-Z][a-z]{2,8} is [1-9][0-9]"}},
    ],
)
def test_expressions_and_grammars(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    for seed in range(3):
        assert re.fullmatch("[A-Z][a-z]{2,8} is [1-9][0-9]", content(client, seed=seed, extra_body=fields))


def test_choices_and_json_under_all_their_names(client: openai.OpenAI) -> None:
    for fields in ({"guided_choice": ["red", "green"]}, {"structured_outputs": {"choice": ["red", "green"]}}):
        assert content(client, extra_body=fields) in ("red", "green")
    schema = Person.model_json_schema()
    for fields in (
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"structured_outputs": {"json": schema, "whitespace_pattern": " "}},
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}},
    ):
        Person.model_validate_json(content(client, extra_body=fields))
    free = content(client, extra_body={"response_format": {"type": "json_object"}})
    assert isinstance(json.loads(free), dict)
    assert " " not in re.sub('"[^"]*"', "", content(client, extra_body={
        "structured_outputs": {"json": schema, "disable_any_whitespace": True}
    }))  # fmt: skip


def test_structural_tags_leave_other_text_free(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
    tag = {"structures": [{"begin": "Person", "schema": schema, "end": "!"}], "triggers": ["Pers"]}
    for fields in (
        {"response_format": {"type": "structural_tag", **tag}},
        {"structured_outputs": {"structural_tag": json.dumps(tag)}},
    ):
        reply = client.chat.completions.create(
            model="smollm2", messages=ASK, max_tokens=40, temperature=0, extra_body=fields
        )
        text = reply.choices[0].message.content or ""
        assert len(text) > 20
        assert all(json.loads(found)["n"] <= 99 for found in re.findall(r"Person(\{[^}]*\})!", text))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "GetWeather"}}])
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_that_a_small_model_cannot_get_wrong(client: openai.OpenAI, choice: Any, parallel: bool) -> None:
    for seed in range(1 if parallel else 4):
        reply = client.chat.completions.parse(
            model="smollm2", messages=ASK, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1.0,
            parallel_tool_calls=parallel,
        )  # fmt: skip
        calls = reply.choices[0].message.tool_calls or []
        assert reply.choices[0].finish_reason == "tool_calls" and len(calls) >= 1
        assert len(calls) == 1 or (parallel and choice == "required")
        for call in calls:
            assert isinstance(call.function.parsed_arguments, GetWeather | Now)
            assert choice == "required" or call.function.name == "GetWeather"


def test_the_other_dialects(url: str) -> None:
    schema = Person.model_json_schema()
    asked = {"model": "smollm2", "messages": ASK, "format": schema, "stream": False, "options": {"seed": 1}}
    reply = httpx.post(url + "/api/chat", json=asked, timeout=120).json()
    Person.model_validate_json(reply["message"]["content"])
    asked = {"model": "smollm2", "prompt": "A person:", "format": "json", "stream": False, "raw": True}
    reply = httpx.post(url + "/api/generate", json={**asked, "options": {"num_predict": 300, "seed": 4}}, timeout=120)
    assert reply.json()["response"].startswith("{")
    output = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    asked = {"model": "smollm2", "messages": ASK, "max_tokens": 200, **output}
    reply = httpx.post(url + "/v1/messages", json=asked, timeout=120).json()
    Person.model_validate_json(reply["content"][0]["text"])
    text = {"format": {"type": "json_schema", "name": "p", "schema": schema}}
    reply = httpx.post(url + "/v1/responses", json={"model": "smollm2", "input": "A person", "text": text}, timeout=120)
    Person.model_validate_json(reply.json()["output"][-1]["content"][0]["text"])
    asked = {"model": "smollm2", "prompt": "The sky is", "guided_choice": [" blue", " red"]}
    reply = httpx.post(url + "/v1/completions", json=asked, timeout=120).json()
    assert reply["choices"][0]["text"] in (" blue", " red")


def test_hostile_ones_are_refused_while_others_stream(client: openai.OpenAI, url: str) -> None:
    stream = client.chat.completions.create(model="smollm2", messages=ASK, stream=True, max_tokens=60)
    next(iter(stream))
    for fields, word in (
        ({"guided_json": {"type": "integer", "multipleOf": 999983}}, "too long"),
        ({"guided_regex": "(" * 30_000}, "regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x.y/z"}}}}, "fetched"),
    ):
        response = httpx.post(url + "/v1/chat/completions", json={"messages": ASK, **fields}, timeout=120)
        assert response.status_code == 400 and word in response.json()["error"]["message"]
    assert sum(len(chunk.choices) for chunk in stream) > 5
    assert content(client, extra_body={"guided_choice": ["yes", "no"]}) in ("yes", "no")
