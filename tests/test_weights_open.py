"""What a path holds is found by content, and what cannot be opened is told with its cure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import write_gguf
from safetensors.numpy import save_file

from pagoda.errors import ModelError
from pagoda.weights.open import open_source
from pagoda.weights.safetensors import INDEX

ONES = np.ones((2, 4), np.float32)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def model(folder: Path) -> None:
    save_file({"a": ONES}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def gguf(path: Path, **metadata: Any) -> Path:
    write_gguf(path, metadata, {"b": ONES})
    return path


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    model(tmp_path)
    odd = gguf(tmp_path / "blob.safetensors")
    assert set(open_source(str(odd)).tensors) == {"b"}
    (tmp_path / "model.safetensors").rename(tmp_path / "odd.gguf")
    assert set(open_source(str(tmp_path / "odd.gguf")).tensors) == {"a"}


def test_a_directory_with_one_model(tmp_path: Path) -> None:
    gguf(tmp_path / "m.gguf")
    gguf(tmp_path / "mmproj-m.gguf", **{"general.architecture": "clip"})
    (tmp_path / "README.md").write_text("words")
    assert set(open_source(str(tmp_path)).tensors) == {"b"}
    model(tmp_path)
    assert set(open_source(str(tmp_path)).tensors) == {"a"}
    assert set(open_source(str(tmp_path / "m.gguf")).tensors) == {"b"}


def test_a_directory_with_a_split_model(tmp_path: Path) -> None:
    for i in range(2):
        write_gguf(
            tmp_path / f"m-{i + 1:05}-of-00002.gguf", {"split.no": i, "split.count": 2}, {f"t{i}": (ONES, "F16")}
        )
    assert set(open_source(str(tmp_path)).tensors) == {"t0", "t1"}


def test_several_models_are_listed(tmp_path: Path) -> None:
    gguf(tmp_path / "m-q4.gguf")
    gguf(tmp_path / "m-q8.gguf")
    with pytest.raises(ModelError, match=r"2 GGUF models: m-q4\.gguf, m-q8\.gguf.*such as .*/m-q4\.gguf"):
        open_source(str(tmp_path))


def test_an_index_alone_names_its_missing_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(ModelError, match="1 of the 1 shards"):
        open_source(str(tmp_path))


WRONG = {
    "pointer": (POINTER, "git-lfs pointer.*git lfs pull"),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "before 1.6.*weights_only=True"),
    "page": (b"<!doctype html><html>", "a web server's answer"),
    "error": (b'{"error":"Repository not found"}', "a web server's answer"),
    "old": (b"tjgg" + bytes(60), "before GGUF"),
    "empty": (b"", "is empty.*Download it again"),
    "other": (b"hello", "neither safetensors nor GGUF"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", ["model.safetensors", "m.gguf", "pytorch_model.bin"])
def test_what_is_no_model_is_told(tmp_path: Path, case: str, name: str) -> None:
    raw, words = WRONG[case]
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ModelError, match=words) as error:
            open_source(str(path))
        assert str(tmp_path / name) in str(error.value)


def test_a_pointer_among_shards(tmp_path: Path) -> None:
    model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "s1.safetensors")
    (tmp_path / "s2.safetensors").write_bytes(POINTER)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}')
    with pytest.raises(ModelError, match=r"s2\.safetensors is a git-lfs pointer"):
        open_source(str(tmp_path))


def test_paths_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"name of a model on a hub.*pagoda pull"):
        open_source("Qwen/Qwen3-0.6B")
    for path in ("", "./x", "/x/y/z", "x\0y", "x" * 5000):
        with pytest.raises(ModelError) as error:
            open_source(path)
        assert "Hugging" not in str(error.value)
    (tmp_path / "m.gguf").symlink_to(tmp_path / "gone")
    for path in ("m.gguf", "."):
        with pytest.raises(ModelError, match=r"m\.gguf is a link to .*gone"):
            open_source(path)


def test_directories_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        open_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no model"):
        open_source(str(tmp_path))


def test_pipes_and_devices_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    for path in (tmp_path / "m.gguf", Path("/dev/zero")):
        with pytest.raises(ModelError, match="not a regular file"):
            open_source(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf")
    path.chmod(0)
    with pytest.raises(ModelError, match="Permission denied"):
        open_source(str(path))
