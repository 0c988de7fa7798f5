"""Reasoning apart from the answer: the splitter by itself, and through the API, streamed and whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from api_fake import EOS, IM_START, ByteTokenizer, Client, FakeEngine, PlainTemplate, events, make_server, without_nulls
from text_models import gguf_byte_metadata

from pagoda.errors import ConfigError
from pagoda.text.output import TextOutput
from pagoda.text.parts import Part, join_parts
from pagoda.text.reasoning import HARMONY, ReasoningFormat, ThinkSplitter, find_reasoning
from pagoda.text.reply import ReplyFormat, ReplyReader, find_format
from pagoda.text.tokenizer import load_tokenizer
from pagoda.text.tools import find_tool_format
from pagoda.types import Delta, Request, SamplingParams

THINK = ReasoningFormat("<think>", "</think>")
QWEN = "{{ messages }}{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"
GPT_OSS = "<|start|>assistant<|channel|>analysis<|message|>"


def split(text: str, step: int, *, opened: bool = False, form: ReasoningFormat = THINK) -> list[Part]:
    """The parts of a text that comes in pieces of `step` characters."""
    reader = ReplyReader(ReplyFormat(form, None), opened=opened)
    parts: list[Part] = []
    for start in range(0, len(text), step):
        got = reader.feed(text[start : start + step])
        assert all(part.text for part in got)
        parts += got
    return join_parts([*parts, *reader.finish()])


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nLet me see.\n\nYes.\n</think>\n\nIt is 4.\n", False, "Let me see.\n\nYes.", "It is 4.\n"),
        ("\n<think>a</think>\n  b", False, "a", "  b"),
        ("a < b </thin </think>c", True, "a < b </thin", "c"),
        ("<think>\n\n</think>\n\nHi", False, "", "Hi"),
        ("plain <think>x</think>", False, "", "plain <think>x</think>"),
        ("  <thing>", False, "", "  <thing>"),
        ("<thi", False, "", "<thi"),
        ("<think>cut off </thi", False, "cut off </thi", ""),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("  \n", False, "", "  \n"),
        (62 * " " + "<think>a</think>b", False, "a", "b"),
        (80 * " " + "<think>a</think>b", False, "", 80 * " " + "<think>a</think>b"),
    ],
)
def test_reasoning_and_content(step: int, text: str, opened: bool, reasoning: str, content: str) -> None:
    wanted = [Part("reasoning", reasoning), Part("content", content)]
    assert split(text, step, opened=opened) == [part for part in wanted if part.text]


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_the_channel_that_gemma_4_thinks_in(step: int) -> None:
    template = "{% if not enable_thinking %}<|channel>thought\\n<channel|>{% endif %}"
    form = find_reasoning(template)
    assert form is not None and form == find_reasoning("", "gemma4")
    text = "<|channel>thought\nLet me see.\n<channel|>It is 4."
    assert split(text, step, form=form) == [Part("reasoning", "Let me see."), Part("content", "It is 4.")]
    assert not form.is_open("<|turn>model\n<|channel>thought\n<channel|>") and form.is_open("<|channel>thought\n")


def test_the_special_tokens_of_gemma_4_s_channel_are_read() -> None:
    tokens = ["<|channel>", "<channel|>", "<|tool_call>"]
    metadata = gguf_byte_metadata()
    metadata["tokenizer.ggml.tokens"] += tokens
    metadata["tokenizer.ggml.token_type"] += [3] * 3
    tokenizer = load_tokenizer("m.gguf", metadata)
    form = ReplyFormat(find_reasoning("", "gemma4"), None)
    shown = frozenset(i for i in tokenizer.special_ids if tokenizer.token_text(i) in form.marks(tools=True))
    out = TextOutput(tokenizer, Request(request_id="r", prompt_token_ids=[], params=SamplingParams()), shown)
    ids = tokenizer.encode("<|channel>thought\nLet me see.\n<channel|>It is 4.<|tool_call>", add_special_tokens=False)
    assert len(tokenizer.special_ids.intersection(ids)) == 3
    reader = ReplyReader(form)
    parts = [part for i in ids for part in reader.feed(out.feed(Delta(request_id="r", token_ids=[i])).text)]
    assert join_parts(parts + reader.finish()) == [Part("reasoning", "Let me see."), Part("content", "It is 4.")]


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<think>\nHm.\n</think>\n\n<response>\nIt is < 4.\n</response>\n", "It is < 4."),
        ("<think>Hm.</think>no marks\n\nhere", "no marks\n\nhere"),
        ("<think>Hm.</think><response>cut </resp", "cut </resp"),
        ("<think>Hm.</think>\n", ""),
        ("<think>Hm.</think><response>a </response> <response>b</response>\n", "a </response> <response>b"),
        ("<think>Hm.</think>Write <response> first, </response> last</response>", None),
        ("<think>Hm.</think><response>a</response>" + 80 * " ", "a</response>"),
        ("<think>Hm.</think>" + 80 * " " + "<response>a</response>", None),
    ],
)
def test_marks_around_the_answer_are_left_out(step: int, text: str, content: str | None) -> None:
    """And nowhere else: `None` is all that follows the reasoning."""
    content = text.partition("</think>")[2] if content is None else content
    template = "{{ messages }}<think></think><response>{{ content }}</response>"
    form = find_reasoning(template)
    assert form is not None and form == find_reasoning("", "ernie45")
    parts = [Part("reasoning", "Hm."), Part("content", content)]
    assert split(text, step, form=form) == [part for part in parts if part.text]
    assert find_reasoning(template.replace("response", "answer")) == find_reasoning("", "hunyuan_a13b")
    assert find_reasoning("<think></think>") == find_reasoning("", "qwen3")


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_call_behind_the_marks(step: int) -> None:
    """And one inside of them."""
    form = ReplyFormat(find_reasoning("", "ernie45"), find_tool_format("", "hermes"))
    call = '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
    for text in (
        f"<response>\nHi </response>.\n</response>\n\n{call}\n",
        f"<response>Hi </response>.\n{call}</response>",
    ):
        reader, parts = ReplyReader(form, schemas={"get": {}}), []
        for i in range(0, len(text), step):
            parts += reader.feed(text[i : i + step])
        told = join_parts([*parts, *reader.finish()])
        content = "".join(part.text for part in told if part.kind == "content")
        assert content.strip() == "Hi </response>." and Part("call", "get") in told


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_marks_around_an_answer_without_reasoning(step: int) -> None:
    """As with `enable_thinking` false."""
    form = find_reasoning("", "hunyuan_a13b")
    assert form is not None
    assert split("<answer>\nHi < you.\n</answer>", step, form=form) == [Part("content", "Hi < you.")]


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_gpt_oss_channels(step: int) -> None:
    text = (
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary<|message|>I'll look."
        "<|end|><|start|>assistant<|channel|>final<|message|>It's 4 < 5."
    )
    assert split(text, step, form=HARMONY) == [Part("reasoning", "Think."), Part("content", "I'll look.It's 4 < 5.")]
    assert split("No channels at all.", step, form=HARMONY) == [Part("content", "No channels at all.")]


@pytest.mark.parametrize("unit", ["<think>", "</thin", "\n", "<", " a\n<think>\n"])
def test_hostile_text_takes_linear_time(unit: str) -> None:
    def seconds(size: int) -> float:
        splitter = ThinkSplitter(THINK, opened=True)
        text = unit * (size // len(unit))
        start = time.thread_time()
        for i in range(0, len(text), 4):
            splitter.feed(text[i : i + 4])
        return time.thread_time() - start

    seconds(1000)
    # Quadratic would be 16 times as long.
    assert seconds(240_000) < 10 * min(seconds(60_000) for _ in range(3))


def test_format_is_found_in_the_template() -> None:
    assert find_reasoning(QWEN) == THINK
    assert find_reasoning("{% set content = content.split('</think>')[-1] %}") == THINK
    assert find_reasoning(GPT_OSS) is HARMONY
    assert find_reasoning("<|user|>{{ x }}<|end|>") is None
    assert find_reasoning(QWEN, "none") is None
    named = find_reasoning("", "deepseek_r1")
    assert named is not None and named.opened
    with pytest.raises(ConfigError, match="qwen3"):
        find_format("", "nonsense")


TEXT = "<think>\nHmm, ö 🙂.\n</think>\n\nThe answer."


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(make_server(FakeEngine(TEXT), chat_template=PlainTemplate(QWEN))) as made:
        yield made


def test_whole_reply_has_both_names_and_the_account(client: Client) -> None:
    reply = client.chat().json()
    assert without_nulls(reply["choices"][0]["message"]) == {
        "role": "assistant",
        "content": "The answer.",
        "reasoning_content": "Hmm, ö 🙂.",
        "reasoning": "Hmm, ö 🙂.",
    }
    thought = len("<think>\nHmm, ö 🙂.\n</think>".encode())
    # "<think" is not yet known to be a mark.
    assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought - len("<think")}


def test_reasoning_may_be_left_out_and_still_counts(client: Client) -> None:
    reply = client.chat(include_reasoning=False).json()
    assert without_nulls(reply["choices"][0]["message"]) == {"role": "assistant", "content": "The answer."}
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 10
    told = events(client.chat(include_reasoning=False, stream=True))[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in told]
    assert "".join(delta.get("content", "") for delta in deltas) == "The answer."
    assert not any("reasoning" in delta for delta in deltas)


def test_stream_never_mixes_and_has_no_empty_delta(client: Client) -> None:
    got = events(client.chat(stream=True, stream_options={"include_usage": True}))
    first, *middle, finish, usage, done = got
    assert done == "[DONE]" and first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"] for chunk in middle]
    kinds = [tuple(delta) for delta in deltas]
    switch = kinds.index(("content",))
    assert set(kinds[:switch]) == {("reasoning_content", "reasoning")} and set(kinds[switch:]) == {("content",)}
    assert all(value for delta in deltas for value in delta.values())
    assert all(delta["reasoning"] == delta["reasoning_content"] for delta in deltas[:switch])
    assert "".join(delta["reasoning"] for delta in deltas[:switch]) == "Hmm, ö 🙂."
    assert "".join(delta["content"] for delta in deltas[switch:]) == "The answer."
    assert finish["choices"][0]["delta"] == {} and finish["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens_details"]["reasoning_tokens"] > 10


def test_log_probabilities_and_ids_of_all_tokens_are_told(client: Client) -> None:
    whole = client.chat(logprobs=True, return_token_ids=True).json()["choices"][0]
    got = [chunk["choices"][0] for chunk in events(client.chat(logprobs=True, return_token_ids=True, stream=True))[:-1]]
    assert [i for choice in got for i in choice.get("token_ids", [])] == whole["token_ids"]
    entries = [entry for choice in got if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert entries == whole["logprobs"]["content"]
    assert all(choice["delta"] or choice["finish_reason"] for choice in got)


@pytest.mark.parametrize(("opening", "thinks"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)])
def test_the_prompt_says_whether_the_answer_begins_as_reasoning(opening: str, thinks: bool) -> None:
    template = PlainTemplate(QWEN, opening)
    with Client(make_server(FakeEngine("hm\n</think>\n\nyes"), chat_template=template)) as client:
        message = client.chat().json()["choices"][0]["message"]
    assert message.get("reasoning") == ("hm" if thinks else None)
    assert message["content"] == ("yes" if thinks else "hm\n</think>\n\nyes")


def test_thinking_off_closes_what_the_template_opens() -> None:
    engine = FakeEngine("yes")
    with Client(make_server(engine, chat_template=PlainTemplate("<think>", "<think>\n"))) as client:
        message = client.chat(reasoning_effort="minimal").json()["choices"][0]["message"]
        assert without_nulls(message) == {"role": "assistant", "content": "yes"}
        assert bytes(engine.requests[0].prompt_token_ids[1:]).endswith(b"<think>\n\n</think>\n\n")
        assert "reasoning_content" in client.chat(think=True).json()["choices"][0]["message"]


def test_an_answer_cut_off_in_its_reasoning() -> None:
    with Client(make_server(FakeEngine(TEXT), chat_template=PlainTemplate(QWEN))) as client:
        choice = client.chat(max_tokens=11).json()["choices"][0]
    assert choice["message"]["content"] == "" and choice["message"]["reasoning"] == "Hmm"
    assert choice["finish_reason"] == "length"


def test_parser_none_shows_all() -> None:
    with Client(make_server(FakeEngine(TEXT), chat_template=PlainTemplate(QWEN), reasoning_parser="none")) as client:
        message = client.chat().json()["choices"][0]["message"]
    assert without_nulls(message) == {"role": "assistant", "content": TEXT}


def test_continued_message_goes_on_with_its_reasoning() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>So"},
    ]
    with Client(make_server(FakeEngine(" far.</think>Yes"), chat_template=PlainTemplate(QWEN))) as client:
        body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        message = client.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("far.", "Yes")


def test_marks_are_seen_even_if_they_are_special_tokens() -> None:
    with Client(make_server(FakeEngine("x"), chat_template=PlainTemplate("<|im_start|>"))) as client:
        assert client.server.special_tokens(frozenset(("<|im_start|>", "</think>"))) == {258}


def test_special_tokens_that_an_answer_is_read_by_are_in_its_text() -> None:
    request = Request(request_id="r", prompt_token_ids=[65], params=SamplingParams())
    ids = [IM_START, 66, 259, EOS]

    def text(**more: Any) -> str:
        output = TextOutput(ByteTokenizer(), request, **more)  # type: ignore[arg-type]
        return output.feed(Delta(request_id="r", token_ids=ids)).text

    assert text() == "B"
    assert text(shown=frozenset((IM_START, 7))) == "<|im_start|>B"
