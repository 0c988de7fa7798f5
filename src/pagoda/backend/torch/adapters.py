"""LoRA adapters on the device, and what they add to the products of the rows whose requests use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagoda.arch.lora import AdapterWeights
from pagoda.backend.torch import ops
from pagoda.backend.torch.packs import Dense

Pair = tuple[Dense, Dense]


@dataclass(slots=True)
class Adapters:
    """Those of one model, by place. `rows`: those of the step that is being computed, by place."""

    device: torch.device
    dtype: torch.dtype
    places: dict[int, dict[str, Pair]] = field(default_factory=dict)
    rows: Sequence[tuple[int, Tensor]] = ()

    def put(self, place: int, weights: AdapterWeights) -> None:
        self.places[place] = {
            slot: (self._dense(torch.from_numpy(low.down)), self._dense(torch.from_numpy(low.up)))
            for slot, low in weights.items()
        }

    def _dense(self, values: Tensor) -> Dense:
        return Dense(values.to(self.device, self.dtype).contiguous())


@dataclass(frozen=True, slots=True)
class Adapted:
    """A product that adapters may change: of each slot that it is made of the first output and the one behind."""

    adapters: Adapters
    parts: tuple[tuple[str, int, int], ...]

    @property
    def now(self) -> bool:
        """Whether the step has rows with adapters."""
        return bool(self.adapters.rows)

    def add(self, x: Tensor, y: Tensor) -> None:
        """To the product y of x what the adapters of its rows add."""
        for place, rows in self.adapters.rows:
            pairs = self.adapters.places[place]
            for slot, first, last in self.parts:
                if slot in pairs:
                    down, up = pairs[slot]
                    y[rows, first:last] += ops.matmul(ops.matmul(x[rows], down), up)
