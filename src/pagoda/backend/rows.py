"""Where the tokens of a plan are: their positions, their cells in the cache, the rows of each adapter."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagoda.types import BLOCK_SIZE, StepPlan

Index = npt.NDArray[np.intp]


def adapter_rows(plan: StepPlan) -> list[tuple[int, Index]]:
    """The places of the adapters of a plan, and the token rows that each is for."""
    if plan.adapters is None:
        return []
    of_tokens = np.repeat(plan.adapters, np.diff(plan.starts))
    return [(int(place), np.flatnonzero(of_tokens == place)) for place in np.unique(of_tokens) if place >= 0]


def token_positions(plan: StepPlan) -> Index:
    """The absolute position of each token of a plan."""
    lengths = np.diff(plan.starts)
    first = np.repeat(plan.positions - plan.starts[:-1], lengths)
    return np.asarray(first + np.arange(len(plan.tokens)), dtype=np.intp)


def token_cells(plan: StepPlan) -> Index:
    """The cache cell of each token of a plan."""
    tables = plan.block_tables[np.repeat(plan.slots, np.diff(plan.starts))]
    positions = token_positions(plan)
    blocks = tables[np.arange(len(positions)), positions // BLOCK_SIZE]
    return np.asarray(blocks.astype(np.intp) * BLOCK_SIZE + positions % BLOCK_SIZE)


def table_cells(table: npt.NDArray[np.int32], positions: npt.NDArray[np.integer]) -> Index:
    """The cache cells of positions of one request."""
    return np.asarray(table[positions // BLOCK_SIZE].astype(np.intp) * BLOCK_SIZE + positions % BLOCK_SIZE)
