"""instructor: objects in each of its modes, made by a model far too small to write them by itself."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person of a novel."""

    name: str = Field(max_length=20)
    job: Literal["doctor", "sailor"]


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA])
def test_objects(chat: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=chat + "/v1", api_key="EMPTY", max_retries=0), mode=mode)
    made = client.chat.completions.create(
        model="smollm2", response_model=Person, messages=[{"role": "user", "content": "A person."}], max_retries=0
    )
    assert isinstance(made, Person)
