"""The processes that share a model, as one of them sees it."""

from __future__ import annotations

from collections.abc import Callable

from pagoda.arch.spec import ModelSpec
from pagoda.backend.torch.model import Decoder
from pagoda.weights.source import Tensor


class Team:
    """Here, one that has the model alone."""

    count = ""

    def share(self, spec: ModelSpec, tensors: dict[str, Tensor]) -> tuple[ModelSpec, dict[str, Tensor]]:
        """What this process holds of the model."""
        return spec, tensors

    def least(self, work: Callable[[], int]) -> int:
        """The least that any of them comes to; where one fails, all do."""
        return work()

    def joined(self, load: Callable[[], Decoder], most_tokens: int) -> Decoder:
        """The decoder with what this process computes joined to what the others do, in steps of up to `most_tokens`."""
        return load()

    def tried(self, tokens: int, work: Callable[[], object]) -> None:
        """A forward pass of so many tokens that nobody asked for. OutOfMemoryError where there is too little."""
        work()

    def replayed(self) -> None:
        """A graph that has all exchanges of a forward pass in it was launched."""


ALONE = Team()
