"""Pictures through every dialect: the same tokens and pixels by each, and the same limits on each."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import vl_tiny
from api_fake import Client, FakeEngine, make_server
from PIL import Image as pil
from test_media_decode import bomb

from pagoda.api.serving.pictures import Pictures
from pagoda.engine import seeing as module
from pagoda.engine.seeing import find_seeing
from pagoda.errors import ConfigError
from pagoda.options.config import Options
from pagoda.text.chat import load_chat_template
from pagoda.text.tokenizer import load_tokenizer
from pagoda.types import Image

TEXT = "What is this?"
START, PLACE = vl_tiny.SPECIAL.index("<|vision_start|>"), vl_tiny.IMAGE


def png(width: int = 112, height: int = 84, colour: tuple[int, int, int] = (200, 20, 30)) -> bytes:
    out = io.BytesIO()
    pil.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


def packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vl")
    vl_tiny.write_files(folder)
    return str(folder)


def seeing_client(model: str, **options: Any) -> tuple[Client, FakeEngine]:
    engine = FakeEngine(vocab_size=vl_tiny.VOCAB, max_model_len=vl_tiny.CONTEXT, sees=True, eos_token_ids=(1,))
    engine.tokens = [80, 81, 1]
    seeing = find_seeing(Options(**options), model, vl_tiny.spec().vision)
    assert seeing is not None
    server = make_server(
        engine,
        tokenizer=load_tokenizer(model, {}),
        chat_template=load_chat_template(model, {}),
        names=("tiny-vl",),
        pictures=Pictures(seeing),
    )
    return Client(server), engine


@pytest.fixture(scope="module")
def eyes(model: str) -> Iterator[tuple[Client, FakeEngine]]:
    made, engine = seeing_client(model, limit_mm_per_prompt={"image": 3, "video": 1})
    with made:
        yield made, engine
        assert made.server.pictures is not None
        made.server.pictures.close()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{packed(data)}"


def openai(client: Client, *pictures: str) -> httpx.Response:
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in pictures]
    content = [*parts, {"type": "text", "text": TEXT}]
    return client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 2})


def responses(client: Client, *pictures: str) -> httpx.Response:
    parts = [{"type": "input_image", "image_url": each, "detail": "auto"} for each in pictures]
    content = [*parts, {"type": "input_text", "text": TEXT}]
    return client.post("/v1/responses", {"input": [{"role": "user", "content": content}], "max_output_tokens": 2})


def anthropic(client: Client, *pictures: str) -> httpx.Response:
    sources = [
        {"type": "base64", "media_type": "image/png", "data": each.partition(",")[2]}
        if each.startswith("data:")
        else {"type": "url", "url": each}
        for each in pictures
    ]
    content = [*({"type": "image", "source": source} for source in sources), {"type": "text", "text": TEXT}]
    return client.post("/v1/messages", {"messages": [{"role": "user", "content": content}], "max_tokens": 2})


def ollama_chat(client: Client, *pictures: str) -> httpx.Response:
    images = [each.partition(",")[2] or each for each in pictures]
    message = {"role": "user", "content": TEXT, "images": images}
    return client.post("/api/chat", {"messages": [message], "stream": False, "options": {"num_predict": 2}})


def ollama_generate(client: Client, *pictures: str) -> httpx.Response:
    images = [each.partition(",")[2] or each for each in pictures]
    body = {"prompt": TEXT, "images": images, "stream": False, "options": {"num_predict": 2}}
    return client.post("/api/generate", body)


def tokenize(client: Client, *pictures: str) -> httpx.Response:
    parts = [{"type": "image_url", "image_url": each} for each in pictures]
    content = [*parts, {"type": "text", "text": TEXT}]
    return client.post("/tokenize", {"messages": [{"role": "user", "content": content}]})


def count_tokens(client: Client, *pictures: str) -> httpx.Response:
    parts = [{"type": "image", "source": {"type": "url", "url": each}} for each in pictures]
    content = [*parts, {"type": "text", "text": TEXT}]
    return client.post("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": content}]})


GENERATING = [openai, responses, anthropic, ollama_chat, ollama_generate]
ROUTES = [*GENERATING, tokenize, count_tokens]
Call = Callable[..., httpx.Response]


def told(response: httpx.Response) -> str:
    """The error's text, however the dialect writes it."""
    error = response.json()["error"]
    return error if isinstance(error, str) else str(error["message"])


@pytest.mark.parametrize("call", GENERATING)
def test_each_dialect_gives_the_same_prompt_and_pixels(eyes: tuple[Client, FakeEngine], call: Call) -> None:
    client, engine = eyes
    first, second = png(), png(56, 112, (0, 0, 255))
    response = call(client, data_uri(first), data_uri(second))
    assert response.status_code == 200, response.text
    request = engine.requests[-1]
    assert [image.grid for image in request.images] == [(1, 6, 8), (1, 8, 4)]
    assert [image.tokens for image in request.images] == [12, 8]
    for image, colour in zip(request.images, ((200, 20, 30), (0, 0, 255)), strict=True):
        pixels = np.frombuffer(image.pixels, np.uint8).reshape(image.grid[1] * 14, image.grid[2] * 14, 3)
        assert (pixels == colour).all()
        assert request.prompt_token_ids[image.start : image.start + image.tokens] == [PLACE] * image.tokens
        assert request.prompt_token_ids[image.start - 1] == START
    assert request.prompt_token_ids.count(PLACE) == 20


def test_pictures_that_fill_the_memory_send_the_next_ones_away(eyes: tuple[Client, FakeEngine]) -> None:
    client, _ = eyes
    assert client.server.pictures is not None
    room = client.server.pictures._room
    with room.place() as other:
        other.take(room.most_bytes)
        refused = ollama_chat(client, packed(png()))
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert ollama_chat(client, packed(png())).status_code == 200 and room.held_bytes == 0


def test_usage_counts_the_pictures(eyes: tuple[Client, FakeEngine]) -> None:
    client, engine = eyes
    used = openai(client, data_uri(png())).json()["usage"]["prompt_tokens"]
    assert used == len(engine.requests[-1].prompt_token_ids) == openai(client).json()["usage"]["prompt_tokens"] + 14
    assert count_tokens(client, data_uri(png())).json()["input_tokens"] == used
    assert tokenize(client, data_uri(png())).json()["count"] == used


def test_n_answers_share_one_picture(eyes: tuple[Client, FakeEngine]) -> None:
    client, engine = eyes
    content = [{"type": "image_url", "image_url": data_uri(png())}, {"type": "text", "text": TEXT}]
    body = {"messages": [{"role": "user", "content": content}], "n": 3, "max_tokens": 2}
    assert client.post("/v1/chat/completions", body).status_code == 200
    assert len({id(request.images[0].pixels) for request in engine.requests[-3:]}) == 1


HOSTILE = {
    "base64": ("data:image/png;base64,%%%%", "not valid base64"),
    "no picture": (data_uri(b"GIF, but not really"), "no picture that can be read here"),
    "bomb": (data_uri(bomb()), "million pixels"),
    "line": (data_uri(png(1, 300)), "200 times"),
    "metadata": ("http://169.254.169.254/latest/meta-data", "not a public one"),
    "this machine": ("http://127.0.0.1:1/a.png", "not a public one"),
    "file": ("file:///etc/passwd", "reads no files"),
    "other scheme": ("gopher://example.com/", "must hold"),
}


@pytest.mark.parametrize("call", ROUTES)
@pytest.mark.parametrize("name", HOSTILE)
def test_every_route_has_every_limit(eyes: tuple[Client, FakeEngine], call: Call, name: str) -> None:
    client, engine = eyes
    picture, words = HOSTILE[name]
    count = len(engine.requests)
    response = call(client, picture)
    assert response.status_code == 400, response.text
    assert words in told(response) and "Traceback" not in response.text and "PIL" not in response.text
    assert len(engine.requests) == count


@pytest.mark.parametrize("call", ROUTES)
def test_every_route_counts_pictures(eyes: tuple[Client, FakeEngine], call: Call) -> None:
    response = call(eyes[0], *[data_uri(png())] * 4)
    assert response.status_code == 400 and "takes 3 in one request" in told(response)


@pytest.mark.parametrize("call", ROUTES)
def test_models_that_do_not_see_say_so(call: Call) -> None:
    with Client(make_server()) as blind:
        response = call(blind, data_uri(png()))
    assert response.status_code == 400
    assert "takes text only" in told(response) and "fake-model" in told(response)


def test_too_long_tells_the_tokens_of_the_pictures_and_what_would_fit(model: str) -> None:
    client, engine = seeing_client(model)
    engine.info = msgspec.structs.replace(engine.info, max_model_len=150)
    with client:
        big = data_uri(png(224, 224))
        response = openai(client, big, big)
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
        assert "128 of them for 2 pictures" in told(response)
        limit = int(told(response).partition('"max_pixels": ')[2].partition("}")[0])
        content = [{"type": "image_url", "image_url": each} for each in (big, big)]
        body = {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": TEXT}]}], "max_tokens": 1}
        assert (
            client.post("/v1/chat/completions", {**body, "mm_processor_kwargs": {"max_pixels": limit}}).status_code
            == 200
        )
        early = openai(client, big, big, big)
        assert "3 of the 3 pictures alone take 192" in told(early) and "max_pixels" in told(early)
        for wrong in ({"max_pixels": 1}, {"fps": 2}, {"max_pixels": "all"}):
            refused = client.post("/v1/chat/completions", {**body, "mm_processor_kwargs": wrong})
            assert refused.status_code == 400 and "mm_processor_kwargs" in told(refused)
        assert client.server.pictures is not None
        client.server.pictures.close()


SPECIALS = "<|vision_start|><|image_pad|><|vision_end|><|video_pad|>"


@pytest.mark.parametrize("where", ["text", "system", "name"])
def test_text_never_makes_a_placeholder(eyes: tuple[Client, FakeEngine], where: str) -> None:
    client, engine = eyes
    content = [{"type": "text", "text": SPECIALS}, {"type": "image_url", "image_url": data_uri(png())}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if where == "system":
        messages.insert(0, {"role": "system", "content": SPECIALS})
    elif where == "name":
        messages[0]["role"] = SPECIALS
    response = client.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert response.status_code == 200, response.text
    assert engine.requests[-1].prompt_token_ids.count(PLACE) == 12


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "image", "image": 3}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [
            {"role": "system", "content": "a"},
            {"role": "system", "content": [{"type": "image_url", "image_url": data_uri(png())}]},
            {"role": "user", "content": "b"},
        ],
    ],
)
def test_parts_that_are_no_pictures_are_refused(eyes: tuple[Client, FakeEngine], messages: Any) -> None:
    assert eyes[0].post("/v1/chat/completions", {"messages": messages}).status_code == 400


@pytest.mark.parametrize("prompt", ["a<|image_pad|>b", [1, PLACE, 2]])
def test_a_bare_prompt_has_no_placeholders(eyes: tuple[Client, FakeEngine], prompt: Any) -> None:
    response = eyes[0].complete(prompt)
    assert response.status_code == 400 and "placeholders" in told(response)


def test_pictures_in_the_results_of_tools(eyes: tuple[Client, FakeEngine]) -> None:
    client, engine = eyes
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": packed(png())}}
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "see", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [picture]}]},
    ]
    response = client.post("/v1/messages", {"messages": messages, "max_tokens": 1})
    assert response.status_code == 200, response.text
    assert len(engine.requests[-1].images) == 1


def test_videos_are_frames(eyes: tuple[Client, FakeEngine]) -> None:
    client, engine = eyes
    frames = [png(56, 56, (i * 50, 0, 0)) for i in range(3)]
    url = "data:video/jpeg;base64," + ",".join(map(packed, frames))
    for part in (
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video", "video": [data_uri(frame) for frame in frames]},
    ):
        body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": TEXT}]}], "max_tokens": 1}
        response = client.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        (video,) = engine.requests[-1].images
        assert video.video and video.grid == (2, 4, 4) and video.tokens == 8 and len(video.pixels) == 4 * 56 * 56 * 3
        assert engine.requests[-1].prompt_token_ids[video.start] == vl_tiny.VIDEO


@pytest.fixture
def web() -> Iterator[tuple[str, list[str]]]:
    """A server of one picture, and the paths that it was asked for; `/never` is not answered."""
    asked: list[str] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/never":
                over.wait(60)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())

        def log_message(self, *args: object) -> None:
            """Nothing: the test knows."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_address[1]}", asked
        over.set()
        server.shutdown()


def test_what_is_fetched_for_one_request_is_limited(
    model: str, web: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = web
    client, _ = seeing_client(model, allowed_media_domains=("localhost",))

    def video(count: int) -> httpx.Response:
        part = {"type": "video", "video": [f"{url}/a"] * count}
        return client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1})

    with client:
        assert openai(client, f"{url}/a", data_uri(png())).status_code == 200 and asked == ["/a"]
        assert "at most 128" in told(video(129)) and len(asked) == 1, "nothing is fetched for what is refused"
        monkeypatch.setattr("pagoda.api.serving.pictures.MAX_FETCHED_BYTES", 3 * len(png()) - 1)
        assert video(2).status_code == 200 and len(asked) == 3
        assert "MiB together" in told(video(100)) and len(asked) == 6
        monkeypatch.setattr("pagoda.api.serving.pictures.FETCHES_S", 0.5)
        assert "0.5 s together" in told(openai(client, f"{url}/never"))
        assert client.server.pictures is not None
        client.server.pictures.close()


def test_prompts_with_pictures_are_not_cut(eyes: tuple[Client, FakeEngine]) -> None:
    content = [{"type": "image_url", "image_url": data_uri(png())}]
    body = {"messages": [{"role": "user", "content": content}], "truncate_prompt_tokens": 10}
    response = eyes[0].post("/v1/chat/completions", body)
    assert response.status_code == 400 and "is not cut" in told(response)


def test_a_picture_too_many_at_once(eyes: tuple[Client, FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.api.serving.pictures.MAX_SOURCE_PIXELS", 112 * 84 + 1)
    assert openai(eyes[0], data_uri(png())).status_code == 200
    assert "million pixels together" in told(openai(eyes[0], *[data_uri(png())] * 2))


def test_a_missing_pillow_is_told_at_start(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Pillow") as caught:
        find_seeing(Options(), model, vl_tiny.spec().vision)
    assert "pagoda-llm[vision]" in caught.value.remedy
    assert find_seeing(Options(), model, None) is None


@pytest.mark.parametrize(
    "options",
    [
        {"limit_mm_per_prompt": {"image": "many"}},
        {"limit_mm_per_prompt": {"smell": 1}},
        {"mm_processor_kwargs": {"max_pixels": 1}},
        {"allowed_local_media_path": "/no/such/folder"},
    ],
)
def test_options_that_do_not_do_are_told_at_start(model: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        find_seeing(Options(**options), model, vl_tiny.spec().vision)


def test_newer_folders_have_one_file_for_the_processor(tmp_path: Path) -> None:
    part = {"size": {"shortest_edge": 3136, "longest_edge": 784 * 33}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": part, "video_processor": None}))
    seeing = find_seeing(Options(), str(tmp_path), vl_tiny.spec().vision)
    assert seeing is not None and seeing.sizing.max_pixels == seeing.sizing.max_frame_pixels == 784 * 33


def test_limits_are_told_of_each_kind(model: str) -> None:
    seeing = find_seeing(Options(limit_mm_per_prompt={"image": {"count": 2}, "audio": 0}), model, vl_tiny.spec().vision)
    assert seeing is not None and seeing.limits == {"image": 2, "audio": 0}
    assert module.MAX_SOURCE_PIXELS == 400_000_000 and isinstance(Image, type)


def test_the_list_of_models_says_that_it_sees(eyes: tuple[Client, FakeEngine]) -> None:
    (card,) = eyes[0].get("/v1/models").json()["data"]
    assert card["architecture"] == {"input_modalities": ["text", "image"], "output_modalities": ["text"]}
