"""How chat templates of families that see show pictures: short ones of the constructs that theirs are made of."""

from __future__ import annotations

from typing import Any

import pytest

from pagoda.errors import BadRequest
from pagoda.text.chat import ChatTemplate

# Qwen3-VL shows pictures in such a loop, Qwen3.5 in such a macro
QWEN = """{%- set seen = namespace(images=0, videos=0) %}
{%- macro shown(content, count) %}
  {%- if content is string %}{{- content }}
  {%- else %}
    {%- for item in content %}
      {%- if item.type == "image" or "image" in item or "image_url" in item %}
        {%- if count %}{%- set seen.images = seen.images + 1 %}{% endif %}
        {%- if add_vision_id is defined and add_vision_id %}Picture {{ seen.images }}: {% endif -%}
        <|vision_start|><|image_pad|><|vision_end|>
      {%- elif item.type == "video" or "video" in item %}
        {%- if count %}{%- set seen.videos = seen.videos + 1 %}{% endif -%}
        <|vision_start|><|video_pad|><|vision_end|>
      {%- elif "text" in item %}{{- item.text }}{%- endif %}
    {%- endfor %}
  {%- endif %}
{%- endmacro %}
{%- for message in messages %}
  {%- if message.role == "tool" %}
    {{- "<|im_start|>user\\n<tool_response>\\n" + shown(message.content, true) + "\\n</tool_response><|im_end|>\\n" }}
  {%- else %}{{- "<|im_start|>" + message.role + "\\n" + shown(message.content, true) + "<|im_end|>\\n" }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{% endif %}"""

GEMMA = """{{ bos_token }}
{%- for message in messages %}
  {%- set role = "model" if message["role"] == "assistant" else message["role"] %}
  {{- "<start_of_turn>" + role + "\\n" }}
  {%- if message["content"] is string %}{{ message["content"] | trim }}
  {%- elif message["content"] is iterable %}
    {%- for item in message["content"] %}
      {%- if item["type"] == "image" %}{{ "<start_of_image>" }}
      {%- elif item["type"] == "text" %}{{ item["text"] | trim }}{% endif %}
    {%- endfor %}
  {%- else %}{{ raise_exception("Invalid content type") }}{% endif %}
  {{- "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}"""

MISTRAL = """{{- bos_token }}
{%- for message in messages %}
  {%- if message["role"] == "user" %}
    {%- if message["content"] is string %}{{- "[INST]" + message["content"] + "[/INST]" }}
    {%- else %}
      {{- "[INST]" }}
      {%- for block in message["content"] %}
        {%- if block["type"] == "text" %}{{- block["text"] }}
        {%- elif block["type"] in ["image", "image_url"] %}{{- "[IMG]" }}
        {%- else %}{{- raise_exception("Only text and image blocks") }}{% endif %}
      {%- endfor %}
      {{- "[/INST]" }}
    {%- endif %}
  {%- else %}{{- message["content"] + eos_token }}{% endif %}
{%- endfor %}"""

PICTURE = {"type": "image"}
TEXT = {"type": "text", "text": "What?"}


def rendered(template: str, *content: Any, **more: Any) -> str:
    made = ChatTemplate(template, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    return made.render([{"role": "user", "content": list(content)}], template_kwargs=more)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            QWEN,
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (GEMMA, "<s><start_of_turn>user\n<start_of_image>What?<end_of_turn>\n<start_of_turn>model\n"),
        (MISTRAL, "<s>[INST][IMG]What?[/INST]"),
    ],
)
def test_a_picture_is_shown_where_it_stands(template: str, said: str) -> None:
    assert rendered(template, PICTURE, TEXT) == said


def test_qwen3_vl_counts_pictures_and_shows_videos() -> None:
    said = rendered(QWEN, PICTURE, {"type": "video"}, PICTURE, TEXT, add_vision_id=True)
    assert (
        said.count("<|image_pad|>") == 2 and said.count("<|video_pad|>") == 1 and "Picture 2: <|vision_start|>" in said
    )


def test_a_picture_is_shown_where_the_template_takes_strings_only() -> None:
    """As with the language model's own template in GGUF. What a user writes is no place for a picture."""
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    made = ChatTemplate(plain, picture="<IMG_CONTEXT>")
    chat = [{"role": "user", "content": [PICTURE, TEXT]}, {"role": "user", "content": "\ue000"}]
    said = "<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n<|im_start|>user\n\ue000<|im_end|>\n"
    assert made.render(chat) == said
    with pytest.raises(BadRequest, match="takes text only"):
        ChatTemplate(plain).render(chat)
