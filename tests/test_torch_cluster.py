"""Tensor parallel over a real Ray cluster of two machines: the tokens of one rank, losses, refusals."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import engine_tiny
import psutil
import pytest
import ray
from api_fake import on_port
from checkpoints import write_checkpoint
from msgspec.structs import replace as structs_replace
from ray.cluster_utils import Cluster
from test_torch_parallel import _chunks, answers

from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.select import load_executor
from pagoda.backend.torch import cluster
from pagoda.backend.torch.cluster import About, RayCpuExecutor, check_alike, fingerprint, gpu_index
from pagoda.backend.torch.parallel import Job
from pagoda.cli.serve import make_server
from pagoda.engine.client import EngineClient
from pagoda.errors import ConfigError, ModelError, PagodaError
from pagoda.options.config import Options
from pagoda.weights.open import open_source

_SMALL = {"num_cpus": 1, "object_store_memory": 80 << 20}
_LARGE = {**_SMALL, "num_cpus": 3}
"""Two ranks are both placed here, behind the first; of four one is on the other machine."""


def _started(tries: int = 3) -> Cluster:
    """Ray gives a node 30 s to start, which a busy machine may miss."""
    made = Cluster()
    try:
        made.add_node(**_SMALL, include_dashboard=False)
        made.add_node(**_LARGE)
    except Exception as error:
        made.shutdown()
        if "timed out during startup" not in str(error) or tries == 1:
            raise
        return _started(tries - 1)
    return made


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two machines' worth of processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = _started()
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        ray.shutdown()
        made.shutdown()


def _same(path: Path, size: int) -> None:
    one, many = answers(path, 1), answers(path, size, distributed_executor_backend="ray")
    assert one.pop("bytes") > many.pop("bytes")
    assert many == one
    assert not ray.is_initialized()


# of four one is on the other machine; five processes that import PyTorch and Ray take the time
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_tokens_of_one_rank(size: int, machines: Cluster, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    _same(tmp_path, size)


@pytest.mark.slow
def test_a_stream_outlives_the_loss_of_a_rank(machines: Cluster, tmp_path: Path) -> None:
    path = engine_tiny.write(tmp_path)
    options = Options(
        model=path, device="torch-cpu", tensor_parallel_size=2, served_model_name=("m",), num_gpu_blocks_override=32,
        distributed_executor_backend="ray",
    )  # fmt: skip
    body = {"model": "m", "prompt": "hello", "max_tokens": 150, "temperature": 0, "stream": True, "ignore_eos": True}
    engine = EngineClient(options.engine_config(path), backoff_s=0.01)
    with on_port(make_server(options, path, engine), engine) as url:  # type: ignore[arg-type]
        undisturbed = list(_chunks(url, body))
        got = []
        for count, text in enumerate(_chunks(url, body)):
            got.append(text)
            if count == 3:
                (rank,) = _ranks()
                os.kill(rank.pid, signal.SIGKILL)
        assert "".join(got) == "".join(undisturbed) != ""
        assert engine.restarts == 1
        got.clear()
        for count, text in enumerate(_chunks(url, {**body, "max_tokens": 40})):
            got.append(text)
            if count == 3:  # the machine with room for a rank is gone, and comes back
                machines.remove_node(machines.worker_nodes.copy().pop())
                machines.add_node(**_LARGE)
        assert "".join(undisturbed).startswith("".join(got)) and len(got) > 3
        assert engine.restarts == 2
    ended = time.monotonic() + 120
    while _ranks() and time.monotonic() < ended:
        time.sleep(0.1)
    assert _ranks() == []


def _ranks() -> list[psutil.Process]:
    """The actors of this session that follow."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::Rank"):
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    monkeypatch.setattr(RayCpuExecutor, "place_s", 1.0)
    return Limits(
        max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, tensor_parallel_size=2,
        distributed_executor_backend="ray",
    )  # fmt: skip


def _refused(path: Path, limits: Limits, kind: type[PagodaError] = ConfigError) -> str:
    source = open_source(str(path))
    with pytest.raises(kind) as caught:
        if path.name == "gone":
            path.rename(path.with_name("elsewhere"))
        load_executor("torch-cpu", load_spec(source), source, limits)
    return str(caught.value)


def test_what_the_cluster_cannot_do(machines: Cluster, limits: Limits, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "gone", "llama", num_attention_heads=8, vocab_size=500)
    said = _refused(tmp_path / "gone", limits, ModelError)
    assert re.match(rf"on {re.escape(socket.gethostname())} \([0-9.]+\): {tmp_path}/gone is no file or dir", said), said
    said = _refused(tmp_path / "elsewhere", replace(limits, tensor_parallel_size=8))
    assert "needs 8 free CPUs in the Ray cluster, which has 4 on 2 machines, 4 of them free. `ray status`" in said
    assert not ray.is_initialized()


def test_no_cluster(limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "llama")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    said = _refused(tmp_path, limits)
    assert f"no Ray cluster runs at 127.0.0.1:{port}, which RAY_ADDRESS names. Start it: `ray start --head`" in said
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert "Run the server on a machine of the cluster" in _refused(tmp_path, limits)


def test_without_ray(limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "llama")
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"] + [cluster.__name__]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert _refused(tmp_path, limits) == (
        "--distributed-executor-backend ray needs ray, which is not installed. "
        "Run: pip install 'pagoda-llm[cuda,ray]', on each machine"
    )


def test_machines_that_differ_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    first = Job(0, 2, "", False, 0, str(tmp_path), load_spec(open_source(str(tmp_path))), Limits(64, 2, 64))
    here = About("10.0.0.1", "a", (), "2.13.0", fingerprint(open_source(str(tmp_path))))
    there = structs_replace(here, address="10.0.0.2", host="b")
    check_alike(first, [here, there])
    write_checkpoint(tmp_path / "other", "llama", num_hidden_layers=1)
    other = structs_replace(there, model=fingerprint(open_source(str(tmp_path / "other"))))
    with pytest.raises(ModelError, match=r"^b \(10.0.0.2\) has another model at .* than a \(10.0.0.1\)"):
        check_alike(first, [here, other])
    with pytest.raises(ConfigError, match=r"^b \(10.0.0.2\) has PyTorch 2.7.0, and a \(10.0.0.1\) has 2.13.0"):
        check_alike(first, [here, structs_replace(there, torch="2.7.0")])


def test_the_gpu_that_ray_gives() -> None:
    assert gpu_index("3", None) == 3
    assert gpu_index("3", "2, 3") == 1
    assert gpu_index("GPU-5", "GPU-4,GPU-5") == 1
    for gpu, visible in (("1", "2,3"), ("GPU-5", None)):
        with pytest.raises(ConfigError, match="which CUDA_VISIBLE_DEVICES"):
            gpu_index(gpu, visible)
