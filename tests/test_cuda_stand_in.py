"""The stand-in for a GPU refuses what a GPU refuses: without that, the tests on it would show nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_stand_in import StandIn, install
from cuda_tensors import Forbidden

Work = Callable[[torch.Tensor], object]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with install(monkeypatch, gpus=2, total_bytes=1 << 20) as mode:
        yield mode


def values() -> torch.Tensor:
    return torch.arange(6.0).to("cuda:0")


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 1).any()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x[x > 2],
        lambda x: torch.nonzero(x),
        lambda x: torch.tensor([1.0]).to("cuda:0"),
        lambda x: torch.empty(2, pin_memory=True).to("cuda:0", non_blocking=True),
        lambda x: x[torch.tensor([1, 2])],
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_a_recording_may_not_do_and_a_step_may(work: Work, gpu: StandIn) -> None:
    x = values()
    work(x)
    with pytest.raises(Forbidden), torch.cuda.graph(torch.cuda.CUDAGraph()):
        work(x)


def test_a_replay_computes_in_the_same_memory(gpu: StandIn) -> None:
    x, total, graph = values(), torch.zeros(6, device="cuda:0"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = x * 2
        total += doubled
    assert not total.cpu().any() and doubled.cpu().isnan().all()  # nothing was computed yet
    for _ in range(2):
        graph.replay()
    assert total.tolist() == [0, 4, 8, 12, 16, 20] and doubled.tolist() == [0, 2, 4, 6, 8, 10]
    x.copy_(torch.ones(6))
    graph.replay()
    assert doubled.tolist() == [2] * 6


def test_a_replay_needs_its_memory(gpu: StandIn) -> None:
    x, graph = values(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _ = x * 2
    graph.replay()
    del x
    with pytest.raises(Forbidden, match="freed"):
        graph.replay()


def test_copies_arrive_when_they_were_waited_for(gpu: StandIn) -> None:
    x, event = values(), torch.cuda.Event()
    there = torch.empty(6, pin_memory=True).copy_(x, non_blocking=True)
    event.record()
    behind = torch.empty(6, pin_memory=True).copy_(x, non_blocking=True)
    assert there.isnan().all()
    event.synchronize()
    assert there.tolist() == x.tolist() and gpu.waits
    event.synchronize()
    torch.cuda.current_stream().synchronize()
    assert behind.tolist() == there.tolist()


@pytest.mark.parametrize("waited_for", [0, 1, None])
def test_pinned_memory_stays_until_its_copy_is_done(waited_for: int | None, gpu: StandIn) -> None:
    host = torch.zeros(4, pin_memory=True)
    host.to(torch.device("cuda", 1), non_blocking=True)
    if waited_for is not None:
        torch.cuda.current_stream(waited_for).synchronize()
    host.numpy()[:] = 7
    if waited_for == 1:
        torch.cuda.synchronize(1)
        return
    with pytest.raises(Forbidden, match="pinned memory was written"):
        torch.cuda.synchronize(1)


def test_devices_do_not_mix(gpu: StandIn) -> None:
    x = values()
    assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3, 4, 5, 6]
    for other in (torch.arange(6.0), torch.arange(6.0).to("cuda:1")):
        with pytest.raises(Forbidden):
            _ = x + other
    with pytest.raises(TypeError):
        x.numpy()
    seen: list[int] = []
    torch.cuda.set_device(1)
    thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
    thread.start()
    thread.join()
    assert seen == [0] and torch.cuda.current_device() == 1


def test_memory_is_counted(gpu: StandIn) -> None:
    x = torch.empty(1000, device="cuda:0")
    assert x.cpu().isnan().all() and torch.cuda.memory_allocated() == 4096
    y = x[:500]
    del x
    assert torch.cuda.memory_allocated() == 4096
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1 << 18, device="cuda:0")
    del y
    assert torch.cuda.memory_allocated() == 0 and torch.cuda.max_memory_reserved() == 4096
