"""LangChain's classes with the model in this process, and the streams of `LLM` that they are made of."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import engine_tiny
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel, Field

from pagoda import LLM, SamplingParams
from pagoda.errors import BadRequest
from pagoda.integrations.langchain import ChatPagoda, PagodaLLM

GUIDE_3 = {
    "max_model_len": 8192,
    "gpu_memory_utilization": 0.80,
    "tensor_parallel_size": 1,
    "dtype": "half",
    "max_num_seqs": 32,
}
SMALL: dict[str, Any] = {"max_model_len": 512, "num_gpu_blocks_override": 256, "temperature": 0}


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=20)
    unit: Literal["C", "F"]


class Now(BaseModel):
    """The time."""

    zone: Literal["UTC", "CET"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return engine_tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chat(smollm2_path: str) -> Iterator[ChatPagoda]:
    made = ChatPagoda(model=smollm2_path, **SMALL)
    yield made
    made.close()


@pytest.fixture(scope="module")
def llm(tiny: str) -> Iterator[LLM]:
    with LLM(tiny, num_gpu_blocks_override=64) as made:
        yield made


def test_the_table_of_guide_3_as_written(smollm2_path: str) -> None:
    """VLLM_CONFIG spread into the call, and trust_remote_code in both places."""
    first = PagodaLLM(model=smollm2_path, trust_remote_code=True, **GUIDE_3, temperature=0, max_new_tokens=6)
    table = {**GUIDE_3, "trust_remote_code": True, "temperature": 1.0}
    second = PagodaLLM(
        model=smollm2_path, trust_remote_code=True, vllm_kwargs=table, num_gpu_blocks_override=600, temperature=0
    )
    assert first.llm.info.max_model_len == second.llm.info.max_model_len == 8192
    assert first.llm.info.max_num_seqs == 32
    said = first.invoke("The capital of France is")
    assert said.startswith(" Paris") and said == second.invoke("The capital of France is", max_tokens=6)
    first.close()
    second.close()


def test_int8_of_guide_3(tiny: str, llm: LLM) -> None:
    made = PagodaLLM(model=tiny, dtype="int8", gpu_memory_utilization=0.7, num_gpu_blocks_override=64, max_tokens=4)
    assert made.llm.info.weight_bytes < llm.info.weight_bytes
    assert made.invoke("x") or made.invoke("y")
    made.close()


def test_text_model(tiny: str, llm: LLM) -> None:
    made = PagodaLLM(model=tiny, num_gpu_blocks_override=64, temperature=0, max_tokens=8, n=1)
    prompts = ["hello", "you", "and me"]
    expected = [out.outputs[0].text for out in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))]
    assert made.batch(prompts) == expected == [made.invoke(prompt) for prompt in prompts]
    assert "".join(made.stream("hello")) == expected[0]
    result = made.generate(["hello"], max_tokens=3)
    assert result.generations[0][0].generation_info == {"finish_reason": "length"}
    assert (result.llm_output or {})["token_usage"]["output_tokens"] == 3
    letter = expected[0][2]
    assert made.invoke("hello", stop=[letter]) == expected[0].partition(letter)[0]
    with pytest.raises(BadRequest, match="top_q"):
        made.invoke("hello", top_q=1)
    with pytest.raises(TypeError, match=r"max_model_length.*max_model_len"):
        PagodaLLM(model=tiny, max_model_length=5)
    made.close()


def test_chat(chat: ChatPagoda) -> None:
    chain = ChatPromptTemplate.from_messages([("system", "You are kind."), ("user", "{what}")]) | chat
    whole = chain.invoke({"what": "Hi there"}, max_tokens=24)
    assert whole.content and whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 3
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    pieces = list((chain | StrOutputParser()).stream({"what": "Hi there"}, max_tokens=24))
    assert "".join(pieces) == whole.content and len(pieces) > 3
    assert asyncio.run(chain.ainvoke({"what": "Hi there"}, max_tokens=24)).content == whole.content


def test_a_batch_is_computed_together_and_answers_the_same(chat: ChatPagoda) -> None:
    asked = [f"Say {i}" for i in range(6)]
    alone = [chat.invoke(each, max_tokens=12).content for each in asked]
    steps = chat.llm._core.stats().steps
    assert [each.content for each in chat.batch(asked, max_tokens=12)] == alone
    assert chat.llm._core.stats().steps - steps < 6 * 12


def test_tools(chat: ChatPagoda) -> None:
    with_tools = chat.bind_tools([GetWeather, Now], tool_choice="GetWeather")
    said = with_tools.invoke("How warm is it in Paris?")
    assert said.tool_calls[0]["name"] == "GetWeather" and said.response_metadata["finish_reason"] == "tool_calls"
    GetWeather(**said.tool_calls[0]["args"])
    call_id = said.tool_calls[0]["id"] or ""
    history = [HumanMessage("How warm is it?"), said, ToolMessage("21 degrees", tool_call_id=call_id)]
    assert isinstance(chat.invoke(history, max_tokens=8), AIMessage)
    either = chat.bind_tools([GetWeather, Now], tool_choice="any").invoke("What time is it?", max_tokens=200)
    assert {call["name"] for call in either.tool_calls} <= {"GetWeather", "Now"} and either.tool_calls
    none = chat.bind_tools([Now], tool_choice="none").invoke("Hello", max_tokens=8)
    assert none.content and not none.tool_calls
    with pytest.raises(BadRequest, match="names none of the tools: Now"):
        chat.bind_tools([Now], tool_choice="then").invoke("Hello")


def test_structured_output(chat: ChatPagoda) -> None:
    made = chat.with_structured_output(GetWeather).invoke([SystemMessage("Be brief."), HumanMessage("Paris?")])
    assert isinstance(made, GetWeather)


def test_a_stream_of_the_llm(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    whole = llm.generate("hello", params)[0].outputs[0]
    pieces = list(llm.stream("hello", params))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [i for piece in pieces for i in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [whole.finish_reason]
    with pytest.raises(BadRequest, match="n must be 1"):
        next(llm.stream("hello", SamplingParams(n=2)))


def test_streams_and_calls_share_the_engine(llm: LLM) -> None:
    """An open stream, calls of other threads and an abandoned stream do not disturb each other."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = {prompt: llm.generate(prompt, params)[0].outputs[0].text for prompt in ("abc", "xyz", "left")}
    stream, left = llm.stream("abc", params), llm.stream("left", params)
    begun = [next(stream).text]
    next(left)
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(llm.generate, "xyz", params) for _ in range(4)]
        assert {each.result(60)[0].outputs[0].text for each in others} == {expected["xyz"]}
    left.close()
    assert "".join([*begun, *(piece.text for piece in stream)]) == expected["abc"]
    assert llm._core.stats().scheduler.running == 0 and not llm._shared._open


def test_without_langchain_the_cure_is_named() -> None:
    code = "import sys; sys.modules['langchain_core'] = None; import pagoda.integrations.langchain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'pagoda-llm[langchain]'" in done.stderr
