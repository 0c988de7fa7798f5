"""Which tokens wait for images that are not encoded yet, and which image is to be encoded next."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pagoda.sched.state import Sequence
from pagoda.types import Adapter, Image

Encoded = Callable[[Image], bool]


def at_once(image: Image) -> bool:
    """Of images that are encoded in the step that takes them."""
    return True


class Images:
    """`encoded` says whether steps can take the vectors of an image, `cached` how much of a request is computed."""

    def __init__(self, encoded: Encoded, cached: Callable[[Sequence], int]) -> None:
        self._encoded, self._cached = encoded, cached

    def wanted(self, seqs: Iterable[Sequence]) -> Image | None:
        """For the first that needs an image; None while one that is encoded is being taken: that might push it out."""
        for seq in seqs:
            image = self._next(seq)
            if image is not None:
                return None if self._encoded(image) else image
        return None

    def waits(self, seq: Sequence) -> bool:
        image = self._next(seq)
        return image is not None and not self._encoded(image)

    def clear(self, seq: Sequence, first: int, count: int, most: int) -> int:
        """How many of about `count` tokens from place `first` on, at most `most`, can be computed now."""
        return count if seq.sight is None else seq.sight.clear(first, count, most, self._encoded)

    def _next(self, seq: Sequence) -> Image | None:
        if seq.sight is None:
            return None
        return seq.sight.next_image(seq.computed if seq.slot >= 0 else self._cached(seq))


def needing(what: Image | Adapter, seqs: Iterable[Sequence]) -> list[str]:
    """The requests that an image is part of, or that use an adapter."""
    if isinstance(what, Adapter):
        return [seq.request_id for seq in seqs if seq.request.adapter == what]
    return [seq.request_id for seq in seqs if what.digest in {each.digest for each in seq.request.images}]
