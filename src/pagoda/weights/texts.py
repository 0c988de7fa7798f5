"""Many texts of a file, each decoded when it is asked for: a vocabulary is large, and needed once or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt


class Texts(Sequence[str]):
    """`raw` holds them; text i begins at begins[i] and is sizes[i] bytes long."""

    def __init__(self, raw: Any, begins: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> None:
        self._raw, self._begins, self._sizes = raw, begins, sizes

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return self._text(int(self._begins[place]), int(self._sizes[place]))

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._begins.tolist(), self._sizes.tolist())

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and next(self._places(text), None) is not None

    def index(self, text: str, start: int = 0, stop: int | None = None) -> int:
        for place in self._places(text):
            if start <= place and (stop is None or place < stop):
                return place
        raise ValueError(f"{text!r} is not among the texts")

    def _places(self, text: str) -> Iterator[int]:
        """Where it is; only texts of its size are looked at, and what is no UTF-8 is nobody's."""
        size = len(text.encode("utf-8", "replace"))
        return (int(i) for i in np.flatnonzero(self._sizes == size) if self[int(i)] == text)

    def _text(self, begin: int, size: int) -> str:
        text: str = self._raw[begin : begin + size].decode("utf-8", "replace")
        return text
