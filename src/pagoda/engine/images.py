"""Images between the server and the engine: each goes over once, and stays there while a request needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from pagoda.arch.vision_spec import Vision
from pagoda.engine.messages import Forget, Picture, Submit, ToEngine
from pagoda.errors import BadRequest
from pagoda.types import Image, Request

DIGEST_BYTES = 16


class SentImages:
    """The server's side: which requests in the engine need which images."""

    def __init__(self) -> None:
        self._digests: dict[str, list[bytes]] = {}  # by request
        self._needed: Counter[bytes] = Counter()

    def messages(self, request: Request) -> list[ToEngine]:
        """What to send for a request: the images that are not there yet, and the request without their pixels."""
        out: list[ToEngine] = []
        if request.images:
            self._digests[request.request_id] = [image.digest for image in request.images]
            for image in request.images:
                if not self._needed[image.digest]:
                    out.append(Picture(image.digest, image.pixels))
                self._needed[image.digest] += 1
            bare = [msgspec.structs.replace(image, pixels=b"") for image in request.images]
            request = msgspec.structs.replace(request, images=bare)
        return [*out, Submit(request)]

    def unneeded(self, is_there: Callable[[str], bool]) -> Forget | None:
        """What to send now that some requests may have ended."""
        gone = [name for name in self._digests if not is_there(name)]
        digests = []
        for name in gone:
            for digest in self._digests.pop(name):
                self._needed[digest] -= 1
                if not self._needed[digest]:
                    del self._needed[digest]
                    digests.append(digest)
        return Forget(digests) if digests else None

    def clear(self) -> None:
        """The engine is gone, and what it had."""
        self._digests.clear()
        self._needed.clear()


class HeldImages:
    """The engine's side."""

    def __init__(self) -> None:
        self._pixels: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._pixels)

    def hold(self, picture: Picture) -> None:
        self._pixels[picture.digest] = picture.pixels

    def forget(self, digests: list[bytes]) -> None:
        for digest in digests:
            self._pixels.pop(digest, None)

    def whole(self, request: Request) -> Request:
        """The request with its images' pixels."""
        if not request.images:
            return request
        images = [
            msgspec.structs.replace(image, pixels=self._pixels.get(image.digest, b"")) for image in request.images
        ]
        return msgspec.structs.replace(request, images=images)


def check_images(request: Request, vision: Vision | None) -> None:
    """Raise BadRequest unless the images fill the placeholders of the prompt exactly: executors trust them."""
    if vision is None:
        if request.images:
            raise BadRequest("this model does not see pictures", param="messages")
        return
    kinds = (vision.image_token_id, vision.video_token_id)
    place = held = 0
    prompt = request.prompt_token_ids
    for image in request.images:
        _check_image(image, vision)
        end, wanted = image.start + image.tokens, vision.placeholders(image.grid, video=image.video)
        if image.start < place or end > len(prompt) or prompt[image.start : end] != wanted:
            raise BadRequest("an image does not lie on its placeholders in the prompt", param="messages")
        place = end
        held += sum(token in kinds for token in wanted)
    if sum(token in kinds for token in prompt) != held:
        raise BadRequest("the prompt has placeholders of pictures that were not sent with it", param="prompt")


def _check_image(image: Image, vision: Vision) -> None:
    t, h, w = image.grid
    frames = t * vision.temporal_patch_size if image.video else 1
    whole = min(image.grid) > 0 and h % vision.merge_size == 0 and w % vision.merge_size == 0
    if vision.side and image.grid != (1, vision.side, vision.side):
        raise BadRequest("an image has not the size that the model takes", param="messages")
    if image.video and vision.video_token_id is None:
        raise BadRequest("this model takes pictures, but no videos", param="messages")
    if not whole or image.tokens != vision.tokens(image.grid) or (t > 1 and not image.video):
        raise BadRequest("an image's grid does not fit its tokens", param="messages")
    if len(image.pixels) != frames * h * w * vision.patch_size**2 * 3 or len(image.digest) != DIGEST_BYTES:
        raise BadRequest("an image's pixels do not fit its grid", param="messages")
