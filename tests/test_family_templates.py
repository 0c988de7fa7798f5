"""What the chat templates of newer families do, in short templates of the same constructs, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
from test_text_chat import TOOLS, USER, make
from text_models import write_model
from transformers import AutoTokenizer

from pagoda.text.reasoning import find_reasoning
from pagoda.text.tools import find_tool_format

MINIMAX = """
{%- macro text_of(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro listed(kind, list) -%}
    {{- '<' ~ kind ~ 's>' ~ '\\n' -}}
    {%- for one in list -%}
        {{- '<' ~ kind ~ '>' ~ (one.function | tojson(ensure_ascii=False)) ~ '</' ~ kind ~ '>' ~ '\\n' -}}
    {%- endfor -%}
    {{- '</' ~ kind ~ 's>' -}}
{%- endmacro -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set system, talk = messages[0], messages[1:] -%}
{%- else -%}
    {%- set system, talk = none, messages -%}
{%- endif -%}
{{- ']b]system\\n' ~ (text_of(system.content) if system else 'Be kind.') -}}
{%- if tools -%}{{- '\\n' ~ listed('tool', tools) ~ '<minimax:tool_call>' -}}{%- endif -%}
{{- '[e[\\n' -}}
{%- for message in talk -%}
    {%- if message.role == 'assistant' -%}
        {%- set content = text_of(message.content) -%}
        {%- set thought = '' -%}
        {%- if message.reasoning_content is string -%}
            {%- set thought = message.reasoning_content -%}
        {%- elif '</think>' in content -%}
            {%- set thought = content.split('</think>')[0].strip('\\n').split('<think>')[-1].strip('\\n') -%}
            {%- set content = content.split('</think>')[-1].strip('\\n') -%}
        {%- endif -%}
        {{- ']b]ai\\n' -}}
        {%- if thought and loop.index0 > ns.last_user -%}
            {{- '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- content -}}
        {%- for call in message.tool_calls or [] -%}
            {%- if call.function -%}{%- set call = call.function -%}{%- endif -%}
            {{- '<invoke name="' ~ call.name ~ '">\\n' -}}
            {%- for key, value in call.arguments.items() -%}
                {{- '<parameter name="' ~ key ~ '">' -}}
                {{- value if value is string else value | tojson(ensure_ascii=False) -}}{{- '</parameter>\\n' -}}
            {%- endfor -%}
            {{- '</invoke>\\n' -}}
        {%- endfor -%}
        {{- '[e[\\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}{{- ']b]tool' -}}{%- endif -%}
        {{- '\\n<response>' ~ text_of(message.content) ~ '</response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '[e[\\n' -}}{%- endif -%}
    {%- else -%}
        {{- ']b]' ~ message.role ~ '\\n' ~ text_of(message.content) ~ '[e[\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ']b]ai\\n<think>\\n' -}}{%- endif -%}"""
LFM2 = """{{- bos_token -}}
{%- set keep = keep_past_thinking | default(false) -%}
{%- set ns = namespace(system='', last=-1) -%}
{%- if messages[0].role == 'system' -%}
    {%- set ns.system = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set ns.system = ns.system + ('\\n' if ns.system else '') + 'Tools: [' -%}
    {%- for tool in tools -%}
        {%- if tool is not string -%}{%- set tool = tool | tojson -%}{%- endif -%}
        {%- set ns.system = ns.system + tool + (', ' if not loop.last else ']') -%}
    {%- endfor -%}
{%- endif -%}
{%- if ns.system -%}{{- '<|im_start|>system\\n' + ns.system + '<|im_end|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- set content = message.content if message.content is string else message.content | tojson -%}
    {%- if message.role == 'assistant' and not keep and loop.index0 != ns.last and '</think>' in content -%}
        {%- set content = content.split('</think>')[-1] | trim -%}
    {%- endif -%}
    {{- content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
{#- calls come between <|tool_call_start|> and <|tool_call_end|> -#}"""
TEMPLATES = {"minimax": MINIMAX, "lfm2": LFM2}
CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Köln", "n": 1.5, "all": [True, None]}}}
TALKS: list[list[dict[str, Any]]] = [
    [USER],
    [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFine."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nWell.", "tool_calls": [CALL]},
        {"role": "tool", "content": "12 °C"},
        {"role": "tool", "content": "13 °C"},
    ],
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("model"), bos_token="<|endoftext|>"))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers(theirs: Any, name: str, talk: list[Any], tools: list[Any] | None) -> None:
    for kwargs in ({}, {"keep_past_thinking": True}):
        ours = make(TEMPLATES[name]).render(talk, tools=tools, add_generation_prompt=True, template_kwargs=kwargs)
        options = {"tools": tools, "add_generation_prompt": True, **kwargs}
        assert ours == theirs.apply_chat_template(talk, tokenize=False, chat_template=TEMPLATES[name], **options)


def test_the_forms_of_calls_and_thoughts_are_found() -> None:
    assert find_tool_format(MINIMAX) == find_tool_format("", "minimax_m2")
    assert find_reasoning(MINIMAX) == find_reasoning("", "minimax_m2")
    assert find_tool_format(LFM2) == find_tool_format("", "lfm2")
    assert find_reasoning(LFM2) == find_reasoning("", "qwen3")
