"""Graphs of decode steps: which batches they take, how they are padded, that a replay sees the new batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from triton_cases import again, make_batch

from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.graphs import DecodeGraphs, Recorder, sizes
from pagoda.backend.torch.kernels import attention, stage

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = Heads(4, 2, 16, 0.25, None, 1e-6, False)


def test_sizes() -> None:
    assert sizes(1) == (1,)
    assert sizes(5) == (1, 2, 4, 5)
    assert sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    many = sizes(512)
    assert len(many) < 30 and many[-1] == 512
    for requests in range(1, 513):
        padded = next(size for size in many if size >= requests)
        assert padded <= max(requests + 7, 1.25 * requests)


def tokens(*, contexts: list[int], width: int = 4) -> Batch:
    batch = make_batch([(1, c - 1) for c in contexts], device=str(DEVICE))
    tables = torch.nn.functional.pad(batch.block_tables, (0, width - batch.block_tables.shape[1]))
    rows = torch.arange(len(contexts), dtype=torch.int32, device=DEVICE)
    return replace(batch, block_tables=tables, rows=rows, whole=True, decoding=True)


class Model:
    """Attention over a fixed cache with queries that the tokens' positions choose."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.caches = [torch.randn(64, 16, 2, 16, generator=generator).to(DEVICE) for _ in range(2)]
        self.queries = torch.randn(128, 4, 16, generator=generator).to(DEVICE)
        self.seen: list[int] = []

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.seen.append(len(batch.tokens))
        out = attention.paged_attention(self.queries[batch.positions.long()], *self.caches, batch, SHAPE)
        return out[batch.rows.long()].flatten(1)

    def plain(self, batch: Batch) -> torch.Tensor:
        return ops.paged_attention(self.queries[batch.positions.long()], *self.caches, batch, SHAPE).flatten(1)


def graphs(model: Model, most: int = 6) -> DecodeGraphs:
    record = Recorder() if DEVICE.type == "cuda" else again
    return DecodeGraphs(model, record, most_requests=most, most_context=64, device=DEVICE)


def run(runner: DecodeGraphs, batch: Batch) -> torch.Tensor:
    """As an executor does it: a size that was missing is recorded behind the step."""
    got = runner.run(batch)
    assert got is not None
    got = got.clone()
    if runner.wanted is not None:
        runner.record(runner.wanted, new=False)
    return got


def record_next(runner: DecodeGraphs) -> bool:
    size = runner.next_size()
    if size is not None:
        runner.record(size, new=True)
    return size is not None


def test_steps_are_padded_recorded_and_replayed() -> None:
    model = Model()
    runner = graphs(model)
    for contexts in ([5, 33, 17], [60, 1], [9, 8, 7, 6], [2], [64, 50, 3], [40, 41, 42, 43, 44, 45]):
        batch = tokens(contexts=contexts)
        got = run(runner, batch)
        torch.testing.assert_close(got, model.plain(batch), rtol=1e-4, atol=1e-5)
    assert set(model.seen) == {1, 2, 4, 6}


def test_sizes_are_recorded_ahead_and_harm_no_cell() -> None:
    model = Model()
    runner, seen = graphs(model), []
    run(runner, tokens(contexts=[5, 33, 17]))
    caches = [cache.clone() for cache in model.caches]
    while record_next(runner):
        seen.append(model.seen[-1])
    assert seen == [6, 2, 1] and not record_next(runner)
    assert all(torch.equal(own, before) for own, before in zip(model.caches, caches, strict=True))
    model.seen.clear()
    batch = tokens(contexts=[40, 41, 42, 43, 44, 45])
    got = runner.run(batch)
    assert got is not None and (DEVICE.type == "cpu" or not model.seen)
    torch.testing.assert_close(got, model.plain(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["a prompt", "too many", "fewer rows"])
def test_other_batches_are_left_to_the_caller(why: str) -> None:
    runner = graphs(Model(), most=2)
    batch = tokens(contexts=[5, 6] if why == "fewer rows" else [5] * 3)
    if why == "a prompt":
        batch = make_batch([(2, 0)], device=str(DEVICE))
    if why == "fewer rows":
        batch = replace(batch, rows=batch.rows[:1], whole=False, decoding=False)
    assert runner.run(batch) is None


def test_without_memory_for_a_graph_steps_go_on() -> None:
    def full(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        raise torch.OutOfMemoryError("full")

    model = Model()
    runner = DecodeGraphs(model, full, most_requests=4, most_context=64, device=DEVICE)
    batch = tokens(contexts=[7, 8, 9])
    torch.testing.assert_close(run(runner, batch), model.plain(batch), rtol=1e-4, atol=1e-5)
    run(runner, batch)
    run(runner, tokens(contexts=[7]))
    while record_next(runner):
        assert model.seen[-1] in (1, 2)
    assert sorted(model.seen) == [1, 2, 4, 4]


def test_tokens_of_the_step_before_are_filled_in() -> None:
    tokens = torch.tensor([5, -1, 7, -3, -2], dtype=torch.int32, device=DEVICE)
    sampled = torch.tensor([40, -1, 42], device=DEVICE)
    for found in (stage.told(tokens, sampled), ops.told(tokens, sampled)):
        assert found.dtype == torch.int32 and found.tolist() == [5, 40, 7, 42, 0]
