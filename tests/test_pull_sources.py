"""From one source to the next, between caches, and beside the real huggingface_hub: what is there is found and kept."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import COMMIT, REPO, Fault, Hub, running, sha256
from test_pull_faults import BIG, check_nothing_wrong, check_published, environ, get

from pagoda.deploy.download import hub as hubs
from pagoda.deploy.download.choose import choose, pick_gguf
from pagoda.deploy.download.failures import SourceFailed, Unreachable
from pagoda.deploy.download.fetch import Endpoint
from pagoda.deploy.download.find_model import cached_model, find_model
from pagoda.deploy.download.hub import Listing, RemoteFile, Source, list_files, sources
from pagoda.deploy.download.lock import owned
from pagoda.deploy.download.pull import Report, Wanted, pull
from pagoda.deploy.download.transfer import CHUNK_BYTES, Pace
from pagoda.errors import ConfigError, ModelError

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def files() -> dict[str, bytes]:
    make = random.Random(3)
    return {"config.json": b"{}", BIG: make.randbytes(2**21), "tokenizer.json": make.randbytes(9000)}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with running(files) as started:
        yield started


def cut(hub: Hub, folder: Path, source: str, **more: object) -> None:
    """A pull that breaks off after a million bytes."""
    hub.faults.append(Fault("cut", BIG, 1_000_000))
    with pytest.raises(Unreachable):
        get(hub, folder, source, pace=Pace(tries=1, first_wait_s=0), **more)


@pytest.mark.parametrize("way", [("huggingface", "modelscope"), ("modelscope", "huggingface")])
def test_another_source_goes_on(hub: Hub, tmp_path: Path, way: tuple[str, str]) -> None:
    cut(hub, tmp_path, way[0])
    check_published(hub, get(hub, tmp_path, way[1]).folder)
    assert hub.sent_bytes(BIG) == len(hub.files[BIG])
    check_nothing_wrong(hub, tmp_path)


def test_a_file_that_is_there_is_not_fetched_for_another_cache(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path)
    check_published(hub, get(hub, tmp_path, "modelscope").folder)
    check_published(hub, get(hub, tmp_path, "modelscope", local_dir=tmp_path / "plain").folder)
    assert hub.sent_bytes(BIG) == len(hub.files[BIG])


def test_mirror_then_hub_then_modelscope(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]
) -> None:
    """The mirror breaks off, the hub is not there, ModelScope has the rest; each change is said."""
    lines: list[str] = []
    hub.faults += [Fault("cut", BIG, 1_000_000), Fault("status", BIG, 503, times=1, on="hub")]
    hub.faults.reverse()
    monkeypatch.setattr(hubs, "HUGGING_FACE", NOWHERE)
    with running(files) as scope:
        variables = {**environ(hub, tmp_path), "MODELSCOPE_ENDPOINT": scope.url}
        done = pull(
            Wanted(REPO), variables, Report(say=lines.append, pace=Pace(tries=2, first_wait_s=0, connections=1))
        )
        check_published(hub, done.folder)
        assert scope.sent_bytes(BIG) + hub.sent_bytes(BIG) == len(files[BIG])
    assert done.folder.is_relative_to(tmp_path)


def test_each_change_of_source_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(hubs, "HUGGING_FACE", f"{NOWHERE}/hub")
    variables = {**environ(hub, tmp_path), "HF_ENDPOINT": f"{NOWHERE}/mirror"}
    done = pull(Wanted(REPO), variables, Report(say=lines.append))
    assert "ms/models/acme/tiny-1___5" in str(done.folder)
    assert [line.partition("trying ")[2] for line in lines[:2]] == ["127.0.0.1:9", hub.url.removeprefix("http://")]
    assert "cannot be reached: Connection refused" in lines[0]
    with pytest.raises(SourceFailed, match=r"No source has given .* refused.*; .*no such model") as caught:
        pull(Wanted("acme/other"), variables, Report())
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("revision", [None, "main", "master"])
def test_the_first_branch_of_each_hub(hub: Hub, tmp_path: Path, revision: str | None) -> None:
    for source, branch in (("huggingface", "main"), ("modelscope", "master")):
        place = Source(source, Endpoint(hub.url))
        assert list_files(place, REPO, revision).revision == branch


def test_order_of_sources() -> None:
    def names(choice: str, **variables: str) -> list[str]:
        return [source.name for source in sources(choice, variables)]

    assert names("auto", HF_HOME="/x") == ["huggingface.co", "www.modelscope.cn"]
    mirror = {"HF_ENDPOINT": "https://hf-mirror.com/", "HF_HOME": "/x"}
    assert names("auto", **mirror) == ["hf-mirror.com", "huggingface.co", "www.modelscope.cn"]
    assert names("ms,hf", **mirror) == ["www.modelscope.cn", "hf-mirror.com"]
    assert names("auto", VLLM_USE_MODELSCOPE="True", HF_HOME="/x") == ["www.modelscope.cn", "huggingface.co"]
    with pytest.raises(ConfigError, match="no source 'github'"):
        names("github")


def test_tokens_go_to_their_own_hub(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("saved\n")
    variables = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "https://hf-mirror.com", "MODELSCOPE_API_TOKEN": "m"}
    assert [s.endpoint.token for s in sources("auto", variables)] == [None, "saved", "m"]
    assert [s.endpoint.token for s in sources("hf", variables, token_to_mirror=True)] == ["saved"]
    assert [s.endpoint.token for s in sources("https://huggingface.co", {**variables, "HF_TOKEN": "new"})] == ["new"]


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "a//b",
        "a/../b",
        "a\\b",
        "c:x",
        "con.json",
        "a\x00b",
        "a/" + "b" * 300,
        ".cache/x",
        "a\x1b[2Jb",
    ],
)
def test_hostile_names(tmp_path: Path, name: str) -> None:
    with running({"config.json": b"{}", name: b"evil"}) as hub:
        for source in ("huggingface", "modelscope"):
            with pytest.raises(SourceFailed, match="not safe"):
                get(hub, tmp_path, source)


def test_names_that_differ_by_case_only(tmp_path: Path) -> None:
    with running({"a.json": b"1", "A.json": b"2"}) as hub, pytest.raises(SourceFailed, match="not safe"):
        get(hub, tmp_path)


def test_pages(tmp_path: Path) -> None:
    with running({f"{i}.json": b"%d" % i for i in range(25)}) as hub:
        hub.page_size = 10
        assert len(list_files(Source("huggingface", Endpoint(hub.url)), REPO, None).files) == 25


def listing(*names: str) -> Listing:
    source = Source("huggingface", Endpoint("https://huggingface.co"))
    return Listing(source, REPO, "main", COMMIT, tuple(RemoteFile(name, 1, "0" * 64) for name in names))


def chosen(names: list[str], part: str | None = None, **patterns: list[str]) -> set[str]:
    return {file.path for file in choose(listing(*names), part, **patterns)}


def test_what_is_fetched() -> None:
    texts = ["config.json", "tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "README.md"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    never = ["modeling_x.py", "pytorch_model.bin", "onnx/model.onnx", "original/consolidated.pth", "tf_model.h5"]
    twice = ["consolidated.safetensors", "model.Q4_0.gguf"]
    assert chosen(texts + weights + never + twice) == {*texts, *weights}
    assert chosen(["consolidated.safetensors", *texts]) == {"consolidated.safetensors", *texts}
    assert chosen(texts + weights, include=["*.json"]) == {"config.json", "tokenizer.json"}
    assert chosen(texts + weights, exclude=["*.md", "model-*"]) == {*texts} - {"README.md"}
    pickled = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]
    assert chosen([*texts, *pickled, "training_args.bin", "optimizer.bin"]) == {*texts, *pickled}
    assert chosen(["pytorch_model.bin", "model.Q4_0.gguf"]) == {"model.Q4_0.gguf"}
    pooled = ["modules.json", "1_Pooling/config.json"]
    assert chosen([*weights, *pooled, "onnx/config.json", "runs/config.json"]) == {*weights, *pooled}
    with pytest.raises(ModelError, match=r"no safetensors, no GGUF files and no pytorch_model\.bin"):
        chosen(["config.json", "tf_model.h5"])


def test_which_gguf() -> None:
    split = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"]
    names = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q4_K.gguf", "mmproj-F16.gguf", *split]
    assert pick_gguf(names, None, REPO) == ["m-Q4_K_M.gguf"]
    assert pick_gguf(names, "q4_k", REPO) == ["m-Q4_K.gguf"]
    assert pick_gguf(names, "Q8_0", REPO) == split == pick_gguf(names, split[1], REPO)
    assert pick_gguf(names, "m-Q4_K_S.gguf", REPO) == ["m-Q4_K_S.gguf"]
    with pytest.raises(ModelError, match="no GGUF file Q2_K"):
        pick_gguf(names, "Q2_K", REPO)
    assert chosen(["config.json", *names], "Q4_K_S") == {"config.json", "m-Q4_K_S.gguf", "mmproj-F16.gguf"}
    assert chosen(["config.json", *names, "mmproj-Q8_0.gguf"], "Q8_0") == {"config.json", *split}


def test_found_after_it_was_pulled(tmp_path: Path) -> None:
    names = {"m-Q4_K_M.gguf": b"GGUF4", "m-Q8_0.gguf": b"GGUF8", "a-mmproj-F16.gguf": b"GGUFM"}
    with running(names) as hub:
        variables = environ(hub, tmp_path)
        assert cached_model(f"{REPO}:Q8_0", variables) is None
        for source in ("huggingface", "modelscope"):
            done = get(hub, tmp_path, source, part="Q8_0")
            assert done.model == done.folder / "m-Q8_0.gguf"
        assert cached_model(f"{REPO}:Q8_0", variables) == find_model(f"{REPO}:m-Q8_0.gguf", variables)
        assert cached_model(f"{REPO}:Q4_K_M", variables) is None
        assert cached_model(f"{REPO}:Q8_0", variables, "other") is None


def test_a_model_without_its_weights_is_not_complete(hub: Hub, tmp_path: Path) -> None:
    done = get(hub, tmp_path, include=["config.json"])
    assert cached_model(REPO, environ(hub, tmp_path)) is None
    get(hub, tmp_path)
    assert cached_model(REPO, environ(hub, tmp_path)) == str(done.folder) == find_model(REPO, environ(hub, tmp_path))


def test_offline_opens_no_connection(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        pull(Wanted(REPO), {**environ(hub, tmp_path), "HF_HUB_OFFLINE": "1"}, Report())
    assert not hub.seen


def test_two_at_once(hub: Hub, tmp_path: Path) -> None:
    lock = tmp_path / "hf" / "hub" / "models--acme--tiny-1.5" / ".pagoda" / "lock"
    with owned(lock, REPO), pytest.raises(ModelError, match=f"is being fetched by process {os.getpid()}"):
        get(hub, tmp_path)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lock.parent.mkdir(parents=True)
    lock.write_text(f'{{"pid": {int(dead.stdout)}, "host": "{os.uname().nodename}", "started": 5}}')
    check_published(hub, get(hub, tmp_path).folder)


def pull_process(hub: Hub, home: Path, *words: str) -> subprocess.Popen[str]:
    code = "import sys; from pagoda.cli.main import main; sys.exit(main(sys.argv[1:]))"
    variables = {**os.environ, **environ(hub, home), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, "pull", REPO, *words]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_until_done(home: Path, source: str, make: random.Random) -> tuple[int, int, int]:
    """kill -9 again and again: nothing wrong appears, and only what was in flight is fetched again.

    How often it was killed, the bytes that the hub sent, and those of the model.
    """
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    files = {"config.json": b"{}", **{name: make.randbytes(3_000_000) for name in names}}
    kills = 0
    with running(files) as hub:
        hub.faults.append(Fault("slow", ".safetensors", 2_000_000, times=-1))
        while True:
            process = pull_process(hub, home, "--source", source)
            try:
                out, err = process.communicate(timeout=make.uniform(0.1, 0.7) + kills / 20)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                check_nothing_wrong(hub, home)
                for config in home.rglob("config.json"):
                    check_published(hub, config.parent)
        assert process.returncode == 0, err
        check_published(hub, Path(out.strip()))
        time.sleep(0.1)
        sent = hub.sent_bytes()
        assert sent <= hub.total_bytes() + kills * len(names) * (CHUNK_BYTES + 2**17)
        hub.seen.clear()
        get(hub, home, source)
        assert hub.sent_bytes() == 0
        return kills, sent, hub.total_bytes()


@pytest.mark.parametrize("source", ["huggingface", pytest.param("modelscope", marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, source: str) -> None:
    assert killed_until_done(tmp_path, source, random.Random(11))[0] >= 3


@pytest.mark.slow
@pytest.mark.skipif("PAGODA_KILLS" not in os.environ, reason="minutes: PAGODA_KILLS=200 pytest -s -k killed_very_often")
def test_killed_very_often(tmp_path: Path) -> None:
    make = random.Random(12)
    runs: list[tuple[int, int, int]] = []
    while sum(run[0] for run in runs) < int(os.environ["PAGODA_KILLS"]):
        runs.append(killed_until_done(tmp_path / str(len(runs)), ("huggingface", "modelscope")[len(runs) % 2], make))
    kills, sent, total = (sum(column) for column in zip(*runs, strict=True))
    print(f"{kills} kills in {len(runs)} downloads: {sent} bytes sent for {total}, wrong files published: 0")


class TestRealHub:
    """huggingface_hub speaks with our hub, and reads what we wrote."""

    def run(self, hub: Hub, home: Path, code: str) -> str:
        pytest.importorskip("huggingface_hub")
        variables = {**os.environ, **environ(hub, home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    def test_it_downloads_from_the_hub_and_we_find_it(self, hub: Hub, tmp_path: Path) -> None:
        code = f"from huggingface_hub import snapshot_download; print(snapshot_download({REPO!r}))"
        folder = self.run(hub, tmp_path, code)
        check_published(hub, Path(folder))
        assert hub.sent_bytes() == hub.total_bytes()
        assert get(hub, tmp_path).folder == Path(folder)
        assert hub.sent_bytes() == hub.total_bytes()

    def test_it_finds_what_we_wrote(self, hub: Hub, tmp_path: Path) -> None:
        folder = get(hub, tmp_path).folder
        code = f"""
from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache
info = scan_cache_dir()
[repo], [revision] = info.repos, next(iter(info.repos)).revisions
assert not info.warnings, info.warnings
assert repo.repo_id == {REPO!r} and revision.commit_hash == {COMMIT!r} and revision.refs == {{"main"}}
assert repo.size_on_disk == {hub.total_bytes()}, repo.size_on_disk
assert try_to_load_from_cache({REPO!r}, {BIG!r})
print(snapshot_download({REPO!r}))
"""
        assert self.run(hub, tmp_path, code) == str(folder)
        assert hub.sent_bytes() == hub.total_bytes()

    def test_it_finds_a_local_folder(self, hub: Hub, tmp_path: Path) -> None:
        get(hub, tmp_path, local_dir=tmp_path / "plain")
        folder = str(tmp_path / "plain")
        code = f"from huggingface_hub import snapshot_download as get; print(get({REPO!r}, local_dir={folder!r}))"
        self.run(hub, tmp_path, code)
        assert hub.sent_bytes() == hub.total_bytes()


class TestRealModelScope:
    """modelscope speaks with our hub, and reads what we wrote. Runs where that package is installed."""

    def run(self, hub: Hub, home: Path) -> Path:
        pytest.importorskip("modelscope")
        code = f"from modelscope import snapshot_download; print(snapshot_download({REPO!r}))"
        variables = {**os.environ, **environ(hub, home), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip().splitlines()[-1])

    def test_it_downloads_from_the_hub_and_we_find_it(self, hub: Hub, tmp_path: Path) -> None:
        folder = self.run(hub, tmp_path)
        check_published(hub, folder)
        assert get(hub, tmp_path, "modelscope").folder == folder
        assert hub.sent_bytes() == hub.total_bytes()

    def test_it_finds_what_we_wrote(self, hub: Hub, tmp_path: Path) -> None:
        folder = get(hub, tmp_path, "modelscope").folder
        assert self.run(hub, tmp_path) == folder
        assert hub.sent_bytes() == hub.total_bytes()


def test_a_model_where_modelscope_2_keeps_it(hub: Hub, tmp_path: Path) -> None:
    theirs = tmp_path / "ms" / "models" / "acme--tiny-1.5" / "snapshots" / "master"
    theirs.mkdir(parents=True)
    for name in ("config.json", BIG):
        (theirs / name).write_bytes(hub.files[name])
    assert get(hub, tmp_path, "modelscope").folder == theirs
    check_published(hub, theirs)
    assert hub.sent_bytes() == len(hub.files["tokenizer.json"])


def test_proxies(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    variables = {**environ(hub, tmp_path), "HF_ENDPOINT": "http://hub.invalid"}
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    check_published(hub, pull(Wanted(REPO, source="hf"), variables, Report()).folder)
    assert hub.seen[0].headers["host"] == "hub.invalid"
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1080")
    with pytest.raises(Unreachable, match="SOCKS is not spoken here"):
        pull(Wanted(REPO, source="hf"), variables, Report())
    get(hub, tmp_path)


def test_the_hash_names_the_partial_file(hub: Hub, tmp_path: Path) -> None:
    cut(hub, tmp_path, "huggingface")
    assert list(tmp_path.rglob(sha256(hub.files[BIG])))
