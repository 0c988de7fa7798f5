"""Each fault of a hub: what is published is right or nothing, and no byte is fetched twice."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import COMMIT, REPO, Fault, Hub, git_sha1, running, sha256

from pagoda.deploy.download import transfer
from pagoda.deploy.download.failures import AccessDenied, DiskFailed, SourceFailed, Unreachable
from pagoda.deploy.download.partial import Partial, merged
from pagoda.deploy.download.pull import Pulled, Report, Wanted, pull
from pagoda.deploy.download.transfer import Pace
from pagoda.errors import ConfigError

BIG = "model.safetensors"
PACE = Pace(part_bytes=2**18, connections=4, tries=3, first_wait_s=0.01, timeout_s=0.4, stall_s=0.3)


@pytest.fixture
def files() -> dict[str, bytes]:
    make = random.Random(7)
    return {
        "config.json": b'{"model_type": "llama"}',
        BIG: make.randbytes(2**20 + 77),
        "vocab.txt": make.randbytes(999),
    }


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with running(files) as started:
        yield started


@pytest.fixture
def lines() -> list[str]:
    return []


def environ(hub: Hub, folder: Path) -> dict[str, str]:
    return {
        "HF_HOME": str(folder / "hf"),
        "HF_ENDPOINT": hub.url,
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_CACHE": str(folder / "ms"),
    }


def use(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this hub the only one that this process knows of."""
    for name in [name for name in os.environ if name.startswith(("HF_", "MODELSCOPE_", "VLLM_USE"))]:
        monkeypatch.delenv(name)
    for name, value in environ(hub, folder).items():
        monkeypatch.setenv(name, value)


def get(hub: Hub, folder: Path, source: str = "huggingface", pace: Pace = PACE, **more: object) -> Pulled:
    want = Wanted(hub.repo, source=source, **more)  # type: ignore[arg-type]
    return pull(want, environ(hub, folder), Report(pace=pace))


def check_published(hub: Hub, folder: Path) -> None:
    """Every file is there, byte for byte."""
    for name, content in hub.files.items():
        assert (folder / name).read_bytes() == content, name


def check_nothing_wrong(hub: Hub, home: Path) -> None:
    """Whatever is published is right: blobs are what they are called, no file has other content."""
    for blob in (home / "hf" / "hub").glob("models--*/blobs/*"):
        assert blob.name in (sha256(blob.read_bytes()), git_sha1(blob.read_bytes()))
    for path in [*home.glob("hf/hub/models--*/snapshots/*/*"), *home.glob("ms/models/*/tiny*/*.*")]:
        if path.is_file():
            assert path.read_bytes() == hub.files[path.name]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("cut", BIG, 100_000),
        Fault("cut", BIG, 100_000, times=4),
        Fault("stall", BIG, 100_000),
        Fault("expired", BIG, times=2),
        Fault("status", BIG, 500),
        Fault("status", BIG, 503, times=2),
        Fault("status", BIG, 429, headers={"Retry-After": "0"}),
        Fault("wrong_range", BIG),
        Fault("status", "revision", 502),
        Fault("status", "files", 502),
        Fault("slow", BIG, 3_000_000),
        Fault("cut", "vocab.txt", 10),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.value}-{fault.times}" if isinstance(fault, Fault) else "",
)
def test_what_passes_is_overcome(hub: Hub, tmp_path: Path, source: str, fault: Fault) -> None:
    fault = Fault(**vars(fault))
    hub.faults.append(fault)
    done = get(hub, tmp_path, source)
    check_published(hub, done.folder)
    assert done.bytes_got == hub.total_bytes()
    if fault.kind != "wrong_range":
        # That one is sent, and thrown away without a look.
        assert hub.sent_bytes() == hub.total_bytes()
    assert not list(tmp_path.rglob("*.journal"))


def test_ranges_that_are_ignored(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault("cut", BIG, 500_000))
    with pytest.raises(SourceFailed):
        get(hub, tmp_path, pace=Pace(connections=1, tries=1, first_wait_s=0))
    hub.faults.append(Fault("ignore_range", BIG, times=-1))
    check_published(hub, get(hub, tmp_path).folder)


@pytest.mark.parametrize("kind", ["flip", "gzip"])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_wrong_bytes_are_never_published(hub: Hub, tmp_path: Path, kind: str, source: str) -> None:
    hub.faults.append(Fault(kind, BIG, 5, times=-1))
    with pytest.raises(SourceFailed, match=BIG) as caught:
        get(hub, tmp_path, source)
    if kind == "flip":
        assert sha256(hub.files[BIG]) in caught.value.message and not list(tmp_path.rglob(sha256(hub.files[BIG])))
    check_nothing_wrong(hub, tmp_path)
    assert not list(tmp_path.rglob("config.json"))
    hub.faults.clear()
    check_published(hub, get(hub, tmp_path, source).folder)


def test_a_partial_file_that_is_wrong_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault("cut", BIG, 500_000))
    with pytest.raises(Unreachable):
        get(hub, tmp_path, pace=Pace(connections=1, tries=1, first_wait_s=0))
    [partial] = tmp_path.rglob(sha256(hub.files[BIG]))
    with partial.open("r+b") as file:
        file.write(b"wrong")
    check_published(hub, get(hub, tmp_path).folder)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (Fault("html", "revision", times=-1), "not JSON"),
        (Fault("loop", "revision", times=-1), "answers 302"),
        (Fault("status", "revision", 404, times=-1), "no such model"),
        (Fault("status", BIG, 416, times=-1), "answers 416"),
        (Fault("status", BIG, 500, times=-1), "does not give"),
        (Fault("html", BIG, times=-1, on="cdn"), "is cut|was cut"),
    ],
)
def test_what_lasts_is_said(hub: Hub, tmp_path: Path, fault: Fault, match: str) -> None:
    hub.faults.append(fault)
    with pytest.raises(SourceFailed, match=match):
        get(hub, tmp_path)
    check_nothing_wrong(hub, tmp_path)


def test_no_revision(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SourceFailed, match="no such model, revision"):
        get(hub, tmp_path, revision="v9")
    with pytest.raises(ConfigError, match="no branch"):
        get(hub, tmp_path, revision="../../x")
    assert get(hub, tmp_path, revision=COMMIT).folder.name == COMMIT


def test_gated(hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.token = True, "right"
    with pytest.raises(AccessDenied, match="asks for permission") as caught:
        get(hub, tmp_path, "auto")
    assert "Accept its terms" in caught.value.remedy and caught.value.exit_code == 77
    check_nothing_wrong(hub, tmp_path)


def test_a_token_is_for_its_host_only(hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.private, hub.token = True, True, "right"
    tokens = {**environ(hub, tmp_path), "HF_TOKEN": "right", "MODELSCOPE_API_TOKEN": "secret"}
    with pytest.raises(SourceFailed, match="private"):
        pull(Wanted(REPO, source="huggingface"), tokens, Report(pace=PACE))
    assert not any("authorization" in seen.headers or "cookie" in seen.headers for seen in hub.seen)
    pull(Wanted(REPO, source="huggingface", token_to_mirror=True), tokens, Report(pace=PACE))
    sent = {(seen.port, seen.headers.get("authorization")) for seen in hub.seen[1:]}
    assert sent == {("hub", "Bearer right"), ("cdn", None)}
    hub.seen.clear()
    pull(Wanted(REPO, source="modelscope", token_to_mirror=True, local_dir=tmp_path / "m"), tokens, Report(pace=PACE))
    sent = {(seen.port, seen.headers.get("cookie")) for seen in hub.seen}
    assert sent >= {("hub", "m_session_id=secret")} and sent <= {("hub", "m_session_id=secret"), ("cdn", None)}


def test_retry_after_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault("status", BIG, 429, headers={"Retry-After": "1"}, on="hub"))
    started_s = time.monotonic()
    check_published(hub, get(hub, tmp_path, pace=Pace(connections=1)).folder)
    assert time.monotonic() - started_s >= 1


def test_a_trickle_is_a_stall(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault("slow", BIG, 100_000, times=4))
    pace = Pace(part_bytes=2**18, connections=4, first_wait_s=0.01, stall_s=0.2, stall_bytes_per_s=2e5)
    check_published(hub, get(hub, tmp_path, pace=pace).folder)
    assert len([seen for seen in hub.seen if seen.content == BIG]) > 5


def test_the_disk_is_full(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    really = os.pwrite

    def pwrite(fd: int, data: bytes, at: int) -> int:
        nonlocal written
        written += len(data)
        if written > 700_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(fd, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(DiskFailed, match="the disk is full"):
            get(hub, tmp_path, "auto")
    check_nothing_wrong(hub, tmp_path)
    check_published(hub, get(hub, tmp_path).folder)
    assert hub.sent_bytes() < hub.total_bytes() + 5 * transfer.CHUNK_BYTES


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_disk_that_is_really_full(hub: Hub, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(DiskFailed, match=r"needs 1\.0 MiB more") as caught:
            get(hub, disk)
        assert caught.value.exit_code == 74 and "--local-dir" in caught.value.remedy
    finally:
        subprocess.run(["umount", disk], check=True)


def test_merged_spans() -> None:
    assert merged([(0, 2), (4, 6)], (2, 4)) == [(0, 6)]
    assert merged([(5, 9)], (0, 3)) == [(0, 3), (5, 9)]


def test_a_journal_that_promises_too_much(tmp_path: Path) -> None:
    from pagoda.deploy.download.hub import RemoteFile

    content = b"x" * 100
    file = RemoteFile("a", 100, hashlib.sha256(content).hexdigest())
    (tmp_path / file.etag).write_bytes(content[:50])
    (tmp_path / f"{file.etag}.journal").write_bytes(b"0 40\n60 100\n30 45\n45 4")
    partial = Partial(tmp_path, file)
    assert partial.missing() == [(45, 100)] and partial.missing(50, 60) == [(50, 60)]
    partial.write(45, content[45:])
    assert partial.digest() == file.etag
    partial.forget()
    assert not list(tmp_path.iterdir())
