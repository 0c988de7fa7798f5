"""The commands around the caches, as they are typed: pull, list, rm, and serve with a name that is not there yet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import REPO, Fault, Hub, running
from test_pull_faults import check_published, use

from pagoda.cli.main import main
from pagoda.cli.model import local_model
from pagoda.cli.pull import Meter
from pagoda.cli.words import read_words
from pagoda.deploy.download.transfer import Progress
from pagoda.errors import ConfigError, ModelError
from pagoda.integrations.llm import LLM, model_here
from pagoda.options.config import Options

FILES = {"config.json": b"{}", "model.safetensors": b"\x01" * 300_000, "tokenizer.json": b"{}"}

HUGGINGFACE_CLI = ("--local-dir-use-symlinks", "False", "--resume-download")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(dict(FILES)) as started:
        use(started, tmp_path, monkeypatch)
        yield started


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out.strip(), err


@pytest.mark.parametrize("command", ["pull", "list", "rm"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"Usage: pagoda {command}" in out and "Examples:\n  pagoda" in out


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_pull_list_rm(capsys: pytest.CaptureFixture[str], hub: Hub, source: str, tmp_path: Path) -> None:
    assert run(capsys, "list")[1].startswith("No models yet")
    code, folder, err = run(capsys, "pull", REPO, "--source", source)
    assert code == 0 and "all verified" in err
    check_published(hub, Path(folder))
    assert "all there already" in run(capsys, "pull", REPO, f"--source={source}")[2]
    [row] = json.loads(run(capsys, "list", "--json")[1])
    assert (row["name"], row["cache"], row["state"]) == (REPO, source, "")
    assert 300_000 <= row["size_bytes"] < 330_000
    head, line = run(capsys, "list")[1].splitlines()
    assert head.split() == ["NAME", "SIZE", "USED", "CACHE"] and line.split() == [REPO, "0", "MiB", "now", source]
    assert run(capsys, "rm", "acme/other")[0] == 65
    code, out, _ = run(capsys, "rm", REPO)
    assert code == 0 and out.startswith(f"removed {REPO}")
    assert not Path(folder).exists() and not list(tmp_path.rglob("*.safetensors"))
    assert run(capsys, "rm", REPO)[0] == 65


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_an_unfinished_model_is_listed_and_removed(
    capsys: pytest.CaptureFixture[str], hub: Hub, source: str, tmp_path: Path
) -> None:
    hub.faults.append(Fault("flip", "model.safetensors", times=-1))
    hub.files["vocab.txt"] = b"\x02" * 200_000
    hub.faults.append(Fault("cut", "vocab.txt", 100_000, times=1))
    hub.faults.append(Fault("status", "vocab.txt", 404, times=-1, on="cdn"))
    assert run(capsys, "pull", REPO, "--source", source)[0] in (65, 69)
    [row] = json.loads(run(capsys, "list", "--json")[1])
    assert (row["name"], row["state"]) == (REPO, "not finished")
    assert run(capsys, "rm", REPO)[0] == 0
    assert run(capsys, "list")[1].startswith("No models yet")


def test_serve_fetches_on_first_use(capsys: pytest.CaptureFixture[str], hub: Hub) -> None:
    path = local_model(Options(model=REPO))
    check_published(hub, Path(path))
    asked = len(hub.seen)
    assert local_model(Options(model=REPO)) == path
    assert len(hub.seen) == asked, "a model that is there needs no network"


def test_serve_fetches_into_download_dir(hub: Hub, tmp_path: Path) -> None:
    path = local_model(Options(model=REPO, download_dir=str(tmp_path / "mine"), revision="main"))
    assert Path(path).is_relative_to(tmp_path / "mine")


def test_local_dir(capsys: pytest.CaptureFixture[str], hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "here" / "model"
    code, out, _ = run(
        capsys, "pull", REPO, "--local-dir", str(target), "--exclude", "tokenizer.json", *HUGGINGFACE_CLI
    )
    assert code == 0 and out == str(target)
    assert sorted(path.name for path in target.iterdir()) == [".cache", "config.json", "model.safetensors"]
    (target / "config.json").write_text("[]")
    (target / "mine.txt").write_text("kept")
    sent = hub.sent_bytes("model.safetensors")
    assert run(capsys, "pull", REPO, "--local-dir", str(target))[0] == 0
    check_published(hub, target)
    assert hub.sent_bytes("model.safetensors") == sent and (target / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("pull",), "name of one model"),
        (("pull", "a/b", "c/d"), "name of one model"),
        (("pull", "nonsense"), "not the name of a model"),
        (("pull", "a/b", "--sauce", "x"), "no option --sauce"),
        (("pull", "a/b", "--source"), "--source needs a value"),
        (("pull", "a/b", "--source", "git"), "no source 'git'"),
        (("pull", "a/b", "--revision", "../x"), "no branch"),
        (("list", "x"), "takes no x"),
        (("rm",), "name of a model"),
        (("rm", "a/b", "--source", "x"), "no cache x"),
    ],
)
def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], needle: str) -> None:
    code, _, err = run(capsys, *words)
    assert code == 78 and needle in err


def test_words() -> None:
    words = read_words(
        "x", ["a", "--include", "*.json", "b.txt", "--exclude=c", "--", "-d"], ("include", "exclude"), ()
    )
    assert (words.plain, words.values) == (["a", "-d"], {"include": ["*.json", "b.txt"], "exclude": ["c"]})
    with pytest.raises(ConfigError, match="-q"):
        read_words("x", ["-q"], (), ())


def test_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    meter, progress = Meter(), Progress(total_bytes=2**30)
    assert meter(progress) == "0 MiB of 1.0 GiB"
    progress.done_bytes = progress.bytes_got = 2**29
    assert meter(progress) == "512 MiB of 1.0 GiB, 536.9 MB/s, 0:01 left"
    assert meter(progress) == "512 MiB of 1.0 GiB, 268.4 MB/s, 0:02 left"
    progress.bytes_got += 1
    assert "MiB of" in meter(progress)


def test_a_model_in_python_is_fetched_on_first_use(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    path = model_here(REPO)
    check_published(hub, Path(path))
    assert f"{REPO}: 100 % of 0 MiB" in capsys.readouterr().err
    asked = len(hub.seen)
    assert model_here(REPO) == path and len(hub.seen) == asked
    with pytest.raises(ModelError):  # {} is no configuration: it was found, and opened
        LLM(REPO)


def test_a_model_in_python_is_not_fetched_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="pagoda pull"):
        model_here(REPO)
    assert model_here("./nowhere") == "./nowhere" and not hub.seen
