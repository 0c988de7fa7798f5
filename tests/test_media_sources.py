"""Every form in which clients send pictures and videos, and what is wrong with those that are none."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from pagoda.errors import BadRequest
from pagoda.media.sources import Source, has_media, take_sources

DATA = b"\x89PNG picture"
PACKED = base64.b64encode(DATA).decode()
URI = f"data:image/png;base64,{PACKED}"
WEB = "https://example.com/a.png"
PLACE = "messages[0].content[1]"


def taken(part: Any) -> tuple[Any, list[Source]]:
    text = {"type": "text", "text": "What is this?"}
    messages, sources = take_sources([{"role": "user", "content": [text, part]}])
    assert messages[0]["role"] == "user" and messages[0]["content"][0] == text
    return messages[0]["content"][1], sources


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "image_url", "image_url": {"url": URI}}, DATA),
        ({"type": "image_url", "image_url": URI}, DATA),
        ({"type": "image_url", "image_url": {"url": WEB, "detail": "high"}}, WEB),
        ({"type": "input_image", "image_url": WEB, "detail": "auto"}, WEB),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PACKED}}, DATA),
        ({"type": "image", "source": {"type": "url", "url": WEB}}, WEB),
        ({"type": "image", "image": URI}, DATA),
        ({"type": "image", "url": WEB}, WEB),
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PACKED[:8]}\n{PACKED[8:]}"}}, DATA),
        ({"type": "image_url", "image_url": {"url": URI.rstrip("=")}}, DATA),
        ({"type": "image_url", "image_url": {"url": "data:image/svg+xml,%3Csvg%3E"}}, b"<svg>"),
        ({"type": "image_url", "image_url": "file:///pictures/a.png"}, "file:///pictures/a.png"),
    ],
)
def test_pictures(part: dict[str, Any], found: str | bytes) -> None:
    left, sources = taken(part)
    assert left == {"type": "image"}
    assert sources == [Source(PLACE, (found,))]


@pytest.mark.parametrize("url", [URI, WEB])
def test_little_detail_is_told(url: str) -> None:
    assert taken({"type": "image_url", "image_url": {"url": url, "detail": "low"}})[1][0].low
    assert taken({"type": "input_image", "image_url": url, "detail": "low"})[1][0].low
    assert not taken({"type": "image_url", "image_url": {"url": url, "detail": "high"}})[1][0].low


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "video_url", "video_url": {"url": WEB}}, (WEB,)),
        ({"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{PACKED},{PACKED}"}}, (DATA, DATA)),
        ({"type": "video", "video": f"data:image/gif;base64,{PACKED}"}, (DATA,)),
        ({"type": "video", "video": [WEB, {"type": "image_url", "image_url": {"url": WEB}}]}, (WEB, WEB)),
    ],
)
def test_videos(part: dict[str, Any], found: tuple[str | bytes, ...]) -> None:
    left, sources = taken(part)
    assert left == {"type": "video"}
    assert sources == [Source(PLACE, found, video=True)]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url"}, "must hold"),
        ({"type": "image_url", "image_url": 3}, "must hold"),
        ({"type": "image_url", "image_url": {"url": " "}}, "must hold"),
        ({"type": "image_url", "image_url": "data:image/png;base64,%%%"}, "not valid base64"),
        ({"type": "image_url", "image_url": "data:image/png;base64,"}, "is empty"),
        ({"type": "image_url", "image_url": "data:image/png"}, "is written data:"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "source must be"),
        ({"type": "video", "video": []}, "empty"),
        ({"type": "video", "video": [None]}, "must hold"),
        ({"type": "video", "video": [WEB] * 129}, "holds 129 frames; at most 128"),
        ({"type": "video", "video": f"data:video/jpeg;base64,{',' * 200}"}, "holds 201 frames"),
        ({"type": "image_url", "image_url": "data:image/png," + "%41" * 30_000}, "must be in base64"),
        ({"type": "image_url", "image_url": "data:image/png;base64,QUJ\u00c4"}, "not valid base64"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(part: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        taken(part)
    assert caught.value.message.startswith(PLACE) and caught.value.param == "messages"


def test_other_parts_and_messages_stay() -> None:
    messages = [{"role": "system", "content": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]
    assert take_sources(messages) == (messages, [])
    assert not has_media(messages)
    assert has_media([{"role": "user", "content": [{"type": "input_image", "image_url": WEB}]}])
