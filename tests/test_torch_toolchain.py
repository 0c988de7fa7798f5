"""A machine without a compiler, without Python's headers or with a home that may not be written is told of."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from pagoda.backend.torch import device, toolchain
from pagoda.backend.torch.kernels import launch
from pagoda.deploy import doctor
from pagoda.errors import ConfigError


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "Python.h").touch()
    monkeypatch.setattr(toolchain, "headers_folder", lambda: folder)
    return folder


def program(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def test_what_is_lacking_is_named(tmp_path: Path, headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    assert "no gcc or clang" in str(toolchain.lacking({}))
    assert [f.level for f in doctor.compiling({})] == ["note"]
    program(tmp_path / "bin", "clang")
    assert toolchain.lacking({}) is None
    assert [f.level for f in doctor.compiling({})] == ["ok"]
    assert "CC=icc" in str(toolchain.lacking({"CC": "icc"}))
    (headers / "Python.h").unlink()
    found = toolchain.lacking({})
    assert found is not None and "Python.h" in found.message and "-dev" in found.remedy


def test_a_start_says_it_unless_the_kernels_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")

    def not_compiled(of: torch.device) -> launch.Gpu:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(device, "gpu_of", not_compiled)
    with pytest.raises(ConfigError, match="no-such-compiler"):
        device._ready_to_compile(torch.device("cuda", 0))
    monkeypatch.setattr(device, "gpu_of", lambda of: launch.H200)
    device._ready_to_compile(torch.device("cuda", 0))


def test_a_home_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "home").touch()  # below a file nobody may write, not even root
    environ = {"HOME": str(tmp_path / "home")}
    folder = toolchain.use_writable_cache(environ)
    assert environ["TRITON_CACHE_DIR"] == str(folder) and folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert toolchain.use_writable_cache({"HOME": str(tmp_path / "home")}) == folder
    folder.chmod(0o777)
    assert toolchain.use_writable_cache({"HOME": str(tmp_path / "home")}) != folder
    own = {"HOME": str(tmp_path)}
    assert toolchain.use_writable_cache(own) == tmp_path / ".triton" / "cache" and list(own) == ["HOME"]


def test_starting_ahead_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gpu_of", lambda of: launch.H200)
    monkeypatch.delenv(launch.AHEAD, raising=False)
    assert launch.chained(torch.device("cuda", 0)) == {"CHAINED": True, "launch_pdl": True}
    monkeypatch.setitem(os.environ, launch.AHEAD, "0")
    assert launch.chained(torch.device("cuda", 0)) == {"CHAINED": False}
