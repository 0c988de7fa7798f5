"""Tool calls as each family writes them: golden transcripts cut in every way, broken ones, hostile ones."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.errors import BadRequest, ConfigError
from pagoda.text.parts import Part, join_parts
from pagoda.text.reply import ReplyReader, find_format
from pagoda.text.tools import find_tool_format, function_schemas

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "now": {},
}
CITY = '{"city": "Tōkyō }\\" 🗼", "days": 3}'
PLAIN = '{"city": "Paris", "days": 3}'
BOTH = [
    Part("call", "get_weather"),
    Part("arguments", CITY),
    Part("call", "now"),
    Part("arguments", "{}"),
]
BOTH_PLAIN = [BOTH[0], Part("arguments", PLAIN), *BOTH[2:]]


def read(name: str, text: str, step: int) -> list[Part]:
    """The parts of a text that comes in pieces of `step` characters, with nothing shown twice."""
    reader = ReplyReader(find_format("", "none", name), schemas=SCHEMAS)
    parts: list[Part] = []
    for start in range(0, len(text), step):
        parts += reader.feed(text[start : start + step])
    return join_parts([*parts, *reader.finish()])


GOLDEN = [
    (
        "hermes",
        f'I\'ll look.\n<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        [Part("content", "I'll look."), *BOTH],
    ),
    ("hermes", f'<tool_call>{{"arguments": {CITY}, "name": "get_weather"}}</tool_call>', BOTH[:2]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>\nDone.', [*BOTH[2:], Part("content", "Done.")]),
    (
        "hermes",
        f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(PLAIN)}}}</tool_call>',
        BOTH_PLAIN[:2],
    ),
    ("hermes", '<tool_call>{"name": "now", "id": 7, "arguments": null}</tool_call>', BOTH[2:]),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        BOTH_PLAIN,
    ),
    (
        "glm45",
        "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        BOTH_PLAIN,
    ),
    (
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        BOTH_PLAIN,
    ),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {CITY}}}, {{"name": "now", "arguments": {{}}}}]',
        BOTH,
    ),
    ("mistral_args", f"[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{CITY}[TOOL_CALLS]now{{}}", BOTH),
    (
        "llama3_json",
        f'{{"name": "get_weather", "parameters": {CITY}}}; {{"name": "now", "parameters": {{}}}}',
        BOTH,
    ),
    ("llama3_json", f'<|python_tag|>{{"name": "get_weather", "parameters": {CITY}}}', BOTH[:2]),
    ("pythonic", '[get_weather(city="Paris", days=3), now()]', BOTH_PLAIN),
    ("llama4_pythonic", "<|python_start|>[get_weather(city='Paris', days=3), now()]<|python_end|>", BOTH_PLAIN),
    (
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call><start_function_response>",
        BOTH_PLAIN,
    ),
    (
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|><|tool_response>",
        BOTH_PLAIN,
    ),
    ("lfm2", "Hm.<|tool_call_start|>[now()]<|tool_call_end|>", [Part("content", "Hm."), *BOTH[2:]]),
    (
        "deepseek_v3",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{CITY}\n```"
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        BOTH,
    ),
    (
        "deepseek_v31",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{CITY}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        BOTH,
    ),
    (
        "kimi_k2",
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{CITY}"
        "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        BOTH,
    ),
    ("granite", f'<|tool_call|>[{{"name": "get_weather", "arguments": {CITY}}}]', BOTH[:2]),
    ("jamba", '<tool_calls>[\n{"name": "now", "arguments": {}}\n]</tool_calls>', BOTH[2:]),
    ("phi4_mini_json", 'functools[{"name": "now", "arguments": {}}]', BOTH[2:]),
    (
        "openai",
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        f"<|constrain|>json<|message|>{CITY}",
        [Part("reasoning", "Hm."), *BOTH[:2]],
    ),
]


@pytest.mark.parametrize(("name", "text", "wanted"), GOLDEN, ids=[f"{i}-{g[0]}" for i, g in enumerate(GOLDEN)])
def test_golden_transcripts(name: str, text: str, wanted: list[Part]) -> None:
    for step in (1, 2, 5, len(text)):
        assert read(name, text, step) == wanted, step


def test_arguments_are_streamed_as_they_come() -> None:
    reader = ReplyReader(find_format("", "none", "hermes"), schemas=SCHEMAS)
    assert reader.feed('<tool_call>{"name": "now", "arguments"') == []
    assert reader.feed(': {"a": "lo') == [Part("call", "now"), Part("arguments", '{"a": "lo')]
    assert reader.feed('ng"}') == [Part("arguments", 'ng"}')]
    assert reader.feed("}</tool_call>") == [] and reader.finish() == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>\n{name: now}\n</tool_call>"),
        ("hermes", '<tool_call>{"name": "now", "args": {"a": 1}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "no such name", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("hermes", "The <tool_call> tag, <tool_ca and </tool_call>."),
        ("hermes", '<tool_call>{"name": "now", "argum'),
        ("llama3_json", '{"name": "Bob", "age": 3}'),
        ("llama3_json", 'Say {"name": "now", "parameters": {}}'),
        ("pythonic", "[1, 2, now()]"),
        ("pythonic", "[now(x=open('f'))]"),
        ("pythonic", "[now(__import__)]"),
        ("pythonic", "[os.system(cmd='x')]"),
        ("pythonic", "[now(a=" + "[" * 99 + "]" * 99 + ")]"),
        ("pythonic", "[now(a=1e999)]"),
        ("mistral", "[TOOL_CALLS] none"),
        ("glm45", "<tool_call>thing</tool_call>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>now, oh"),
    ],
)
def test_what_is_not_a_call_is_content(name: str, text: str) -> None:
    for step in (1, 4, len(text)):
        assert read(name, text, step) == [Part("content", text)], step


@given(
    st.text(alphabet='<>/tol_ca{}[]",:\\name rgus1', max_size=80), st.sampled_from(["hermes", "mistral", "pythonic"])
)
@settings(max_examples=150, deadline=None)
def test_no_visible_character_is_lost_and_cuts_do_not_matter(text: str, name: str) -> None:
    given_text = '<tool_call>{"name": "' + text
    whole = read(name, given_text, len(given_text))
    assert read(name, given_text, 1) == whole
    if all(part.kind == "content" for part in whole):
        assert "".join(part.text for part in whole).strip() == given_text.strip()


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>{"name": "'),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "'),
        ("hermes", "\n"),
        ("qwen3_coder", "<tool_call><function=now><parameter=a>>>>>"),
        ("mistral", "[TOOL_CALLS]["),
        ("llama3_json", '{"name": "now", "parameters": {}};'),
        ("pythonic", "[now(a="),
        ("functiongemma", "<start_function_call>call:now{a:<escape>b"),
        ("pythonic", "["),
        ("deepseek_v3", "<｜tool▁call▁begin｜>｜"),
        ("openai", "<|channel|>"),
    ],
)
def test_a_megabyte_of_hostile_text_takes_linear_time(name: str, unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        start = time.thread_time()
        read(name, text, 500)
        return time.thread_time() - start

    small = min(seconds(32_000) for _ in range(3))
    # Quadratic would be 1000 times as long.
    assert seconds(1_000_000) < 200 * small + 0.5


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}<tool_call>\\n{...}</tool_call>", "hermes"),
        ("{% if tools %}<tool_call>\\n<function=example>", "qwen3_coder"),
        ("{% if tools %}<tool_call>{name}\\n<arg_key>", "glm45"),
        ("{% if tools %}[AVAILABLE_TOOLS]...[TOOL_CALLS]", "mistral"),
        ("{% if tools %}[TOOL_CALLS]...[ARGS]", "mistral_args"),
        ("{% if tools %}<|python_tag|>", "llama3_json"),
        ("{% if tools %}<start_function_call>call:", "functiongemma"),
        ("{% if tools %}<|tool_call>call:", "gemma4"),
        ("{% if tools %}[func_name1(params_name1=params_value1", "pythonic"),
        ("{% for tool in message.tool_calls %}{{ tools }}<｜tool▁calls▁begin｜>```json", "deepseek_v3"),
        ("{{ tools }}<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("{{ tools }}<|start|><|channel|>", "openai"),
    ],
)
def test_format_is_found_in_the_template(template: str, name: str) -> None:
    found = find_tool_format(template)
    assert found is not None and found is find_tool_format("", name)
    assert find_tool_format(template, "none") is None


def test_unknown_formats() -> None:
    assert find_tool_format("{% if tools %}{{ tools }}") is None
    assert find_tool_format("<tool_call>") is None  # the template has no place for tools
    with pytest.raises(ConfigError, match="hermes"):
        find_tool_format("", "nonsense")


def test_schemas_need_names() -> None:
    assert function_schemas([{"function": {"name": "f", "parameters": None}}]) == {"f": {}}
    with pytest.raises(BadRequest, match=r"tools\[1\]"):
        function_schemas([{"function": {"name": "f"}}, {"function": {}}])
