"""Models that see, from HTTP to the numbers and back: the trained one names colours, on both executors."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import seeing_models
import vl_tiny
from PIL import Image as pil
from server_process import running, serve
from test_engine_restart import over_kills, undisturbed
from vl_trained import COLOURS, trained

from pagoda import LLM, SamplingParams
from pagoda.engine.stream import merge
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request

QUESTION = "What colour is this?"


def picture(colour: str, size: tuple[int, int] = (56, 56)) -> pil.Image:
    return pil.new("RGB", size, COLOURS[colour])


def png(colour: str) -> str:
    out = io.BytesIO()
    picture(colour).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


@pytest.fixture(scope="module", params=["reference", "cpu"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(*serve(trained(), "--served-model-name", "eyes", "--device", request.param)) as address:
        yield address


def post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def asked(url: str, *colours: str, **more: Any) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + png(each)}} for each in colours]
    content = [*parts, {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8, **more}
    return post(url + "/v1/chat/completions", body)


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
def test_the_answer_names_the_colour(url: str, colour: str) -> None:
    reply = asked(url, colour, n=2, logprobs=True)
    assert [choice["message"]["content"].strip() for choice in reply["choices"]] == [colour] * 2
    assert reply["choices"][0]["logprobs"]["content"][0]["logprob"] > -1


def test_each_dialect_sees(url: str) -> None:
    message = {"role": "user", "content": QUESTION, "images": [png("blue")]}
    ollama = {"stream": False, "options": {"temperature": 0, "num_predict": 8}}
    assert post(url + "/api/chat", {"messages": [message], **ollama})["message"]["content"].strip() == "blue"
    generated = post(url + "/api/generate", {"prompt": QUESTION, "images": [png("green")], **ollama})
    assert generated["response"].strip() == "green"
    source = {"type": "base64", "media_type": "image/png", "data": png("red")}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    assert post(url + "/v1/messages", body)["content"][0]["text"].strip() == "red"
    assert "vision" in post(url + "/api/show", {"model": "eyes"})["capabilities"]


def test_the_cache_knows_a_picture_again_and_no_other(url: str) -> None:
    def cached(colour: str) -> tuple[str, int]:
        reply = asked(url, colour, cache_salt="mine")
        return reply["choices"][0]["message"]["content"].strip(), reply["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]

    first, again, other = cached("yellow"), cached("yellow"), cached("blue")
    assert first == ("yellow", 0) and again[0] == "yellow" and again[1] >= 16
    assert other[0] == "blue" and other[1] < again[1]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(trained(), device="reference") as made:
        yield made


def test_in_python_pictures_are_objects(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=8)
    prompt = (
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    given = [
        {"prompt": prompt, "multi_modal_data": {"image": picture("red")}},
        {"prompt": prompt, "multi_modal_data": {"image": [np.asarray(picture("green"))]}},
        {"prompt": prompt.replace("image_pad", "video_pad"), "multi_modal_data": {"video": [picture("blue")] * 4}},
    ]
    answers = llm.generate(given, greedy)
    assert [answer.outputs[0].text.strip() for answer in answers] == ["red", "green", "blue"]
    for part in (
        {"type": "image", "image": picture("blue")},
        {"type": "image_pil", "image_pil": picture("blue")},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + png("blue")}},
    ):
        content = [part, {"type": "text", "text": QUESTION}]
        (answer,) = llm.chat([{"role": "user", "content": content}], greedy)
        assert answer.outputs[0].text.strip() == "blue"
    (answer,) = llm.generate([prompt], greedy)
    assert answer.outputs[0].finish_reason == "error" and "placeholders" in (answer.outputs[0].error or "")


def test_in_python_videos_stand_where_their_text_is(tmp_path: Path) -> None:
    seeing_models.write(tmp_path, "internvl")
    seeing_models.write_texts(tmp_path, "internvl")
    prompt = {"prompt": "user\n<video>\nWhat?", "multi_modal_data": {"video": [picture("blue")] * 2}}
    with LLM(str(tmp_path), device="reference", num_gpu_blocks_override=32) as made:
        (answer,) = made.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
    assert answer.outputs[0].error is None and len(answer.prompt_token_ids or ()) > len("Frame1: Frame2: ") * 2


def requests() -> list[Request]:
    """Several with the same and with other pictures, some of them cut over steps."""
    noise = np.random.default_rng(5).integers(0, 256, (3, 1, 112, 112, 3), np.uint8)
    out = []
    for i in range(6):
        images, prompt = [], [1, 20 + i, 3]
        for number in range(1 + i % 2):
            image = vl_tiny.picture(noise[(i + number) % 3], len(prompt))
            images.append(image)
            prompt += [vl_tiny.IMAGE] * image.tokens + [9, 10]
        params = SamplingParams(seed=i, max_tokens=40, temperature=float(i % 2), logprobs=1, ignore_eos=True)
        out.append(Request(request_id=str(i), prompt_token_ids=prompt, images=images, params=params))
    return out


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_streams_with_pictures_outlive_the_engine(tmp_path: Path, device: str) -> None:
    config = EngineConfig(
        model=vl_tiny.write(tmp_path / "m"), device=device, num_blocks=64, threads=1, max_num_batched_tokens=64
    )
    wanted = requests()
    expected = undisturbed(config, wanted)
    cramped = undisturbed(msgspec.structs.replace(config, num_blocks=12, max_num_batched_tokens=64), wanted)

    for one, deltas in zip(wanted, over_kills(config, wanted, 25), strict=True):
        got, same, put_back = merge(deltas), expected[one.request_id], cramped[one.request_id]
        assert len(got.token_ids) == 40
        assert (got.token_ids, got.logprobs) == (same.token_ids, same.logprobs)
        assert (put_back.token_ids, put_back.logprobs) == (same.token_ids, same.logprobs)
