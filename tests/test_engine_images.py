"""Images on their way to the engine: sent once, kept as long as needed, and refused where they do not fit."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import pytest
from test_sched_images import PLACEHOLDER, VISION

from pagoda.engine.images import HeldImages, SentImages, check_images
from pagoda.engine.messages import Forget, Picture, Submit, ToEngine, frame
from pagoda.engine.process import Wire
from pagoda.errors import BadRequest
from pagoda.types import Image, Request, SamplingParams


def image(start: int = 1, shade: int = 0, **changes: Any) -> Image:
    values = {
        "start": start,
        "tokens": 4,
        "grid": (1, 4, 4),
        "pixels": bytes([shade]) * 48,
        "digest": bytes(15) + bytes([shade]),
    }
    return Image(**{**values, **changes})


def request(name: str, *images: Image, prompt: list[int] | None = None) -> Request:
    if prompt is None:
        prompt = [0] * 12
        for one in images:
            prompt[one.start : one.start + one.tokens] = [PLACEHOLDER] * one.tokens
    return Request(request_id=name, prompt_token_ids=prompt, images=list(images), params=SamplingParams())


def test_an_image_goes_over_once_and_is_forgotten_with_its_last_request() -> None:
    sent, held, alive = SentImages(), HeldImages(), set[str]()

    def send(one: Request) -> tuple[int, Request]:
        alive.add(one.request_id)
        messages = sent.messages(one)
        for message in messages[:-1]:
            assert isinstance(message, Picture)
            held.hold(message)
        last = messages[-1]
        assert isinstance(last, Submit) and not any(each.pixels for each in last.request.images)
        return len(messages) - 1, held.whole(last.request)

    def forget() -> int:
        message = sent.unneeded(alive.__contains__)
        held.forget(message.digests if message is not None else [])
        return 0 if message is None else len(message.digests)

    one, two = request("1", image(1, 1), image(6, 2)), request("2", image(1, 2))
    assert send(one) == (2, one)
    assert send(two) == (0, two)
    assert send(request("3")) == (0, request("3"))
    alive.remove("1")
    assert forget() == 1 and len(held) == 1 and forget() == 0
    assert send(one) == (1, one)
    alive.clear()
    assert forget() == 2 and len(held) == 0
    send(two)
    sent.clear()  # the engine died
    assert forget() == 0 and send(two)[0] == 1


def test_twice_in_one_request_is_once() -> None:
    assert len(SentImages().messages(request("1", image(1, 1), image(6, 1)))) == 2


WRONG = {
    "off its place": request("a", image(2), prompt=request("a", image(1)).prompt_token_ids),
    "behind the prompt": request("a", image(9), prompt=[PLACEHOLDER] * 12),
    "two in one place": request("a", image(1), image(1)),
    "before the prompt": request("a", image(-1), prompt=[PLACEHOLDER] * 4),
    "grid": request("a", image(grid=(1, 4, 8))),
    "odd grid": request("a", image(grid=(1, 2, 8), tokens=4, pixels=b"")),
    "no grid": request("a", image(grid=(0, 4, 4), tokens=0)),
    "film that is a picture": request("a", image(grid=(2, 4, 2))),
    "few pixels": request("a", image(pixels=bytes(47))),
    "digest": request("a", image(digest=b"1")),
    "none sent": request("a", prompt=[1, PLACEHOLDER, 2]),
    "one too few": request("a", image(1), prompt=[0, *[PLACEHOLDER] * 5]),
}


@pytest.mark.parametrize("name", WRONG)
def test_images_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        check_images(WRONG[name], VISION)


def test_images_that_fit_pass() -> None:
    check_images(request("a", image(1), image(5)), VISION)
    check_images(request("a", image(0, grid=(2, 4, 4), tokens=8, pixels=bytes(192), video=True)), VISION)
    check_images(request("a", prompt=[PLACEHOLDER]), None)
    with pytest.raises(BadRequest, match="does not see"):
        check_images(request("a", image(1)), None)


def test_a_large_frame_comes_in_few_reads() -> None:
    ours, theirs = socket.socketpair()
    wire = Wire(theirs)
    big = Picture(b"d", bytes(3_000_000))
    ours.setblocking(False)
    data = frame(big) + frame(Forget([b"d"]))
    frames, reads = [], 0
    while len(frames) < 2:
        while data:
            try:
                data = data[ours.send(data) :]
            except BlockingIOError:
                break
        frames += wire.receive(wait=False)
        reads += 1
        assert reads < 100
    decoder = msgspec.msgpack.Decoder(ToEngine)
    assert [decoder.decode(each) for each in frames] == [big, Forget([b"d"])]
    ours.close()
    theirs.close()
