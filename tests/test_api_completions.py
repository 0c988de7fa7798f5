"""POST /v1/completions in memory: prompts of every kind, echo, log-probabilities, streams."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from api_fake import TEXT, Client, FakeEngine, events, make_server

from pagoda.api.pooling import label_scores


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(make_server()) as made:
        yield made


def engine(client: Client) -> FakeEngine:
    made = client.server.engine
    assert isinstance(made, FakeEngine)
    return made


def test_whole_reply(client: Client) -> None:
    reply = client.complete("ping", max_tokens=5).json()
    assert reply["object"] == "text_completion" and reply["id"].startswith("cmpl-")
    assert reply["choices"] == [
        {
            "index": 0,
            "text": "Hello",
            "logprobs": None,
            "finish_reason": "length",
            **dict.fromkeys(("stop_reason", "prompt_logprobs", "token_ids", "prompt_token_ids")),
        }
    ]
    assert reply["service_tier"] is None and reply["system_fingerprint"] == client.server.fingerprint
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (4, 5)


def test_the_context_is_the_limit_where_nothing_is_said(client: Client) -> None:
    """Clients that complete text without a limit would get 16 tokens from OpenAI and vLLM, and be cut off."""
    reply = client.complete().json()
    assert reply["usage"]["completion_tokens"] > 16 and reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        (["ab", [99]], [[97, 98], [99]]),
    ],
)
def test_prompts_of_every_kind(client: Client, prompt: Any, expected: list[list[int]]) -> None:
    reply = client.complete(prompt, n=2, max_tokens=1).json()
    assert [request.prompt_token_ids for request in engine(client).requests] == [ids for ids in expected for _ in "ab"]
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(expected)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 4 * len(expected)


def test_prompts_of_one_call_share_the_seeds(client: Client) -> None:
    client.complete(["a", "b"], n=2, seed=7)
    seeds = [request.params.seed for request in engine(client).requests]
    assert seeds[0] == seeds[2] == 7 and seeds[1] == seeds[3] != 7


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_a_prompt_as_lm_eval_does(client: Client, max_tokens: int) -> None:
    body = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1234}
    choices = client.complete([[97, 98, 99], [100, 101]], **body).json()["choices"]
    for choice, prompt in zip(choices, ("abc", "de"), strict=True):
        logprobs = choice["logprobs"]
        tokens = [*prompt, *"H"[:max_tokens]]
        assert logprobs["tokens"] == tokens
        assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(tokens) - 1)
        assert logprobs["top_logprobs"] == [None, *({token: -0.5} for token in tokens[1:])]
        assert logprobs["text_offset"] == list(range(len(tokens)))
        assert choice["text"] == "".join(tokens)
        assert choice["finish_reason"] == "length"


def test_text_offsets_count_characters_and_parts_of_one_stay_apart(client: Client) -> None:
    choice = client.complete("é🙂", echo=True, logprobs=0, max_tokens=1).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert len(set(logprobs["tokens"])) == 7
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 1, 2]
    assert choice["text"][logprobs["text_offset"][-1] :] == "H"


def test_tokens_as_ids(client: Client) -> None:
    body = {"logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True, "max_tokens": 2}
    choice = client.complete("a", **body).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == ["token_id:72", "token_id:101"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([72, 101], [97])


def test_zero_probability_is_still_json() -> None:
    class Sure(FakeEngine):
        def _delta(self, *args: Any) -> Any:
            delta = super()._delta(*args)
            for entry in delta.logprobs or []:
                entry.logprob = float("-inf")
                entry.top = [(1, float("-inf"))]
            return delta

    with Client(make_server(Sure())) as client:
        logprobs = client.complete(logprobs=1, max_tokens=1).json()["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"] == [-9999.0]
        content = client.chat(logprobs=True, top_logprobs=1, max_tokens=1).json()["choices"][0]["logprobs"]["content"]
        assert content[0]["top_logprobs"][0]["logprob"] == -9999.0


def test_stream(client: Client) -> None:
    got = events(client.complete(stream=True, max_tokens=99, stream_options={"include_usage": True}))
    *content, finish, usage, done = got
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 54
    assert "".join(chunk["choices"][0]["text"] for chunk in content) == TEXT
    assert finish["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]
    assert all(chunk["object"] == "text_completion" for chunk in got[:-1])


def test_stream_gives_the_same_log_probabilities_as_the_whole_reply(client: Client) -> None:
    body = {"echo": True, "logprobs": 2, "max_tokens": 12, "n": 2}
    whole = client.complete("né", **body).json()["choices"]
    got = events(client.complete("né", stream=True, **body))[:-1]
    for choice in whole:
        mine = [chunk["choices"][0] for chunk in got if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for each in mine if each["logprobs"] for value in each["logprobs"][name]] == values


def test_echo_of_token_ids_is_decoded(client: Client) -> None:
    assert client.complete([258, 104, 105], echo=True, max_tokens=1).json()["choices"][0]["text"] == "hiH"
    assert client.complete("hello", echo=True, truncate_prompt_tokens=2, max_tokens=1).json()["choices"][0]["text"] == (
        "loH"
    )


@pytest.mark.parametrize(("side", "kept"), [(None, "loH"), ("left", "loH"), ("right", "heH")])
def test_a_prompt_is_cut_on_the_side_that_is_named(client: Client, side: str | None, kept: str) -> None:
    fields: dict[str, Any] = {"echo": True, "max_tokens": 1, "truncation_side": side, "add_special_tokens": False}
    assert client.complete("hello", truncate_prompt_tokens=2, **fields).json()["choices"][0]["text"] == kept
    far = client.complete("x" * 10**6, truncate_prompt_tokens=-1, truncation_side=side, max_tokens=1)
    assert far.json()["usage"]["prompt_tokens"] == 511
    assert client.chat("x" * 10**6, truncate_prompt_tokens=7).json()["usage"]["prompt_tokens"] == 7
    assert client.complete("hello", truncation_side="middle").json()["error"]["param"] == "truncation_side"


def test_logprobs_of_named_tokens(client: Client) -> None:
    named = {"logprobs": 0, "logprob_token_ids": [65, 66], "max_tokens": 1}
    choice = client.complete("ab", **named).json()["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [{"A": -0.65, "B": -0.66, "H": -0.5}]
    choice = client.chat("ab", **{**named, "logprobs": True}).json()["choices"][0]
    assert [top["token"] for top in choice["logprobs"]["content"][0]["top_logprobs"]] == ["A", "B"]


def test_scores_of_the_token_that_comes_next(client: Client) -> None:
    body: dict[str, Any] = {"query": "is it?", "items": ["yes", [1, 2]], "label_token_ids": [65, 66]}
    reply = client.post("/generative_scoring", body).json()
    share = math.exp(-0.65) / (math.exp(-0.65) + math.exp(-0.66))
    assert [one["score"] for one in reply["data"]] == [pytest.approx(share)] * 2
    assert (reply["object"], reply["data"][1]["index"], reply["usage"]["completion_tokens"]) == ("list", 1, 2)
    assert reply["id"].startswith("generative-scoring-")
    whole = client.post("/v1/generative_scoring", {**body, "apply_softmax": False, "item_first": True}).json()
    assert whole["data"][0]["score"] == pytest.approx(math.exp(-0.65))
    query = list(b"is it?")
    prompts = [request.prompt_token_ids for request in engine(client).requests]
    assert prompts[-4:] == [[*query, *b"yes"], [*query, 1, 2], [*b"yes", *query], [1, 2, *query]]
    for wrong, param in (
        ({"label_token_ids": []}, "label_token_ids"),
        ({"label_token_ids": [10**6]}, "label_token_ids"),
        ({"items": [[-1]]}, "items"),
        ({"items": []}, "items"),
    ):
        assert client.post("/generative_scoring", {**body, **wrong}).json()["error"]["param"] == param


@pytest.mark.parametrize(("items", "param"), [(10**4, "prompt"), (200, None)])
def test_scores_of_far_too_much_are_refused_before_it_is_joined(client: Client, items: int, param: str | None) -> None:
    body = {"query": [1] * 20_000, "items": [[2]] * items, "label_token_ids": [65]}
    tracemalloc.start()
    try:
        refused = client.post("/generative_scoring", body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.status_code == 400 and peak < 16 << 20  # copies of the query alone would be 32 MB
    assert param is None or refused.json()["error"]["param"] == param


def test_a_label_that_cannot_come_scores_nothing() -> None:
    impossible = [(65, -math.inf), (66, -math.inf)]
    assert label_scores._score(impossible, 65, True) == label_scores._score(impossible, 65, False) == 0.0
    assert label_scores._score([(65, -1.0), (66, -math.inf)], 65, True) == 1.0


def test_prompt_logprobs_stand_in_each_choice(client: Client) -> None:
    choice = client.complete("ab", prompt_logprobs=2, max_tokens=1).json()["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["98"] == {"logprob": -0.5, "decoded_token": "b", "rank": 1}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"prompt": "x", "structured_outputs": {"chioce": ["a"]}}, "structured_outputs"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "x", "use_beam_search": True, "n": 11}, "beam_width"),
        ({"prompt": "x", "use_beam_search": True, "guided_regex": "a"}, "use_beam_search"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": None}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: Client, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/completions", fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert engine(client).requests == []


def test_best_of_has_no_effect_and_is_named(client: Client) -> None:
    assert "x-pagoda-ignored" not in client.complete("x", best_of=1, suffix=None).headers
    assert len(client.complete("x", best_of=2, n=2).json()["choices"]) == 2
    more = client.complete("x", best_of=2)
    assert len(more.json()["choices"]) == 1 and more.headers["x-pagoda-ignored"] == "best_of"


def test_a_bias_beyond_the_range_is_its_limit(client: Client) -> None:
    assert client.complete("x", logit_bias={"5": 1000, "6": -1e9}).status_code == 200
    assert engine(client).requests[-1].params.logit_bias == {5: 100.0, 6: -100.0}


def test_the_clients_own_id_is_part_of_the_answers(client: Client) -> None:
    """Both ways that vLLM takes it; what the engine calls the request stays its own, for two may choose alike."""
    assert client.complete("x", request_id="abc").json()["id"] == "cmpl-abc"
    sent = {"x-request-id": "mine"}
    reply = client.post("/v1/completions", {"prompt": "x", "request_id": "abc"}, headers=sent)
    assert reply.json()["id"] == "cmpl-mine" and reply.headers["x-request-id"] == "mine"
    assert client.complete("x", request_id="a b").json()["id"] != "cmpl-a b"
    assert len({request.request_id for request in engine(client).requests}) == 3


def test_invocations_are_all_routes_in_one(client: Client) -> None:
    body = {"prompt": "ping", "max_tokens": 5}
    assert client.post("/invocations", body).json()["choices"][0]["text"] == "Hello"
    chat = client.post("/invocations", {"messages": [{"role": "user", "content": "x"}], "stream": True})
    assert chat.headers["content-type"].startswith("text/event-stream") and chat.text.endswith("[DONE]\n\n")
    assert "prompt" in client.post("/invocations", {"max_tokens": 5}).json()["error"]["message"]
    assert client.post("/invocations", {"input": "x"}).status_code == 400  # this model makes no embeddings
    assert client.post("/invocations", b"{").status_code == 400


def test_beam_search_gives_the_likeliest_answers(client: Client) -> None:
    """The fake engine says H after anything, and I is the second likeliest."""
    asked = {"use_beam_search": True, "n": 2, "max_tokens": 2, "logprobs": 1}
    reply = client.complete(["x", "y"], **asked).json()
    assert [choice["text"] for choice in reply["choices"]] == ["HH", "HI"] * 2
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["choices"][1]["logprobs"]["token_logprobs"] == [-0.5, -1.5]
    assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 8
    assert {len(request.prompt_token_ids) for request in engine(client).requests} == {1, 2}
    parts = events(client.complete("x", stream=True, **asked))[:-1]
    texts = dict.fromkeys(range(2), "")
    for choice in (part["choices"][0] for part in parts):
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "HH", 1: "HI"}
    chat = client.chat(use_beam_search=True, n=2, max_tokens=2).json()["choices"]
    assert [choice["message"]["content"] for choice in chat] == ["HH", "HI"]
