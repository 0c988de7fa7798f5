"""The installer of a pack: what it refuses, what it keeps, and what is there after it was killed."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from packs import sh, shells, small_pack

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


def versions(place: Path) -> set[str]:
    return {path.name for path in (place / "versions").iterdir()}


@pytest.mark.parametrize("shell", shells())
def test_it_installs_checks_and_goes_back(tmp_path: Path, shell: str) -> None:
    place = tmp_path / "a place" / "tiny"
    one, two = small_pack(tmp_path, "one.pagoda"), small_pack(tmp_path, "two.pagoda")
    assert one.version != two.version
    for made in (one, one, two):
        done = sh(made.parts[0].path, "--dir", place, shell=shell)
        assert done.returncode == 0, done.stdout
        assert os.readlink(place / "current") == f"versions/{made.version}"
    assert os.readlink(place / "previous") == f"versions/{one.version}" and "go back" not in done.stdout
    script = place / "current" / "install.sh"
    assert sh(script, "--check", shell=shell).returncode == 0
    back = sh(script, "--rollback", shell=shell)
    assert back.returncode == 0 and os.readlink(place / "current") == f"versions/{one.version}", back.stdout
    assert os.readlink(place / "previous") == f"versions/{two.version}"
    three = small_pack(tmp_path, "three.pagoda")
    assert sh(three.parts[0].path, "--dir", place, shell=shell).returncode == 0
    assert versions(place) == {one.version, three.version}, "of older versions one is kept"
    (place / "current" / "model" / "tiny" / "3.bin").write_bytes(b"x")
    broken = sh(script, "--check", shell=shell)
    assert broken.returncode == 65 and "model/tiny/3.bin" in broken.stdout
    assert sh(three.parts[0].path, "--dir", place, shell=shell).returncode == 0, "installing again mends it"
    assert sh(script, "--check", shell=shell).returncode == 0


def test_the_launcher_starts_this_version_whatever_the_environment_says(tmp_path: Path) -> None:
    made = small_pack(tmp_path)
    place = tmp_path / "x"
    assert sh(made.parts[0].path, "--dir", place).returncode == 0
    (tmp_path / "link").symlink_to(place / "current" / "bin" / "pagoda")
    hostile = {"PATH": os.environ["PATH"], "PYTHONPATH": "/evil", "PYTHONHOME": "/evil"}
    said = sh(tmp_path / "link", "serve", shell="", env=hostile).stdout
    version = place / "versions" / made.version
    assert said == f"{version}/serve.yaml {place}/current/bin/pagoda [] -m pagoda.cli.main serve\n"
    text = (version / "serve.yaml").read_text()
    assert text == f"model: {place}/current/model/tiny\nport: 8123\n".replace(f"{place}", f"'{place}", 1).replace(
        "tiny\n", "tiny'\n", 1
    )


def test_an_answer_that_differs_keeps_what_was_there(tmp_path: Path) -> None:
    good, bad = small_pack(tmp_path, "good.pagoda"), small_pack(tmp_path, "bad.pagoda", exit=70)
    place = tmp_path / "x"
    assert sh(good.parts[0].path, "--dir", place).returncode == 0
    refused = sh(bad.parts[0].path, "--dir", place)
    assert refused.returncode == 70 and "--skip-answer" in refused.stdout
    assert os.readlink(place / "current") == f"versions/{good.version}" and versions(place) == {good.version}
    assert sh(bad.parts[0].path, "--dir", place, "--skip-answer").returncode == 0


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    made = small_pack(tmp_path, files=3)
    path, place = made.parts[0].path, tmp_path / "x"
    whole = path.read_bytes()
    draw = random.Random(1)
    header = len(whole) - made.parts[0].size
    places = [10, 18, 19, 50, 83, 84, *draw.sample(range(84, header), 12), *draw.sample(range(header, len(whole)), 14)]
    for at in places:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert sh(path, "--check").returncode != 0, at
        done = sh(path, "--dir", place)
        if done.returncode == 0:  # the padding of the tar is nobody's
            assert at >= header and sh(place / "current" / "install.sh", "--check").returncode == 0
            shutil.rmtree(place)
        assert not (place / "current").exists() and not (place.exists() and versions(place)), at


def test_parts_may_be_missing_or_short(tmp_path: Path) -> None:
    made = small_pack(tmp_path, files=100, part_bytes=128 << 10)
    paths = [part.path for part in made.parts]
    assert len(paths) >= 3 and all(path.stat().st_size <= 128 << 10 for path in paths)
    assert sh(paths[0], "--check").returncode == 0
    place = tmp_path / "x"
    hidden = paths[1].rename(tmp_path / "away")
    done = sh(paths[0], "--dir", place)
    assert done.returncode == 66 and f"{paths[1]} is missing" in done.stdout and not place.exists()
    hidden.rename(paths[1])
    data = paths[2].read_bytes()
    paths[2].write_bytes(data[:-1])
    assert f"{paths[2]} has {len(data) - 1} bytes" in sh(paths[0], "--dir", place).stdout
    paths[2].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert f"damaged: {paths[2]}" in sh(paths[0], "--check").stdout
    paths[2].write_bytes(data)
    assert sh(paths[0], "--dir", place).returncode == 0


def test_another_machine_is_refused(tmp_path: Path) -> None:
    made = small_pack(tmp_path, glibc=(99, 1))
    place = tmp_path / "x"
    done = sh(made.parts[0].path, "--dir", place)
    assert done.returncode == 69 and "the pack needs 99.1 or newer" in done.stdout
    if shutil.which("setarch") and os.uname().machine == "x86_64":
        other = sh(made.parts[0].path, "--dir", place, shell="setarch i686 sh")
        assert other.returncode == 69 and "this machine is i686; the pack is for x86_64" in other.stdout
    assert not place.exists()


def test_a_system_without_glibc_is_refused(tmp_path: Path) -> None:
    """As on Alpine: no loader of glibc where the script looks, and a getconf that knows nothing of it."""
    made = small_pack(tmp_path)
    script = made.parts[0].path
    text = script.read_bytes().replace(b"/lib64/ld-linux-x86-64.so.2", b"/lib64/ld-musl-xx-x86-64.so", 1)
    head = text[: len(text) - made.parts[0].size]
    own = hashlib.sha256(head[83:]).hexdigest().encode()
    script.write_bytes(text[:19] + own + text[83:])
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "getconf").write_text("#!/bin/sh\nexit 1\n")
    (tools / "getconf").chmod(0o755)
    done = sh(script, "--dir", tmp_path / "x", env={"PATH": f"{tools}:{os.environ['PATH']}", "HOME": "/"})
    assert done.returncode == 69 and "no glibc was found here" in done.stdout


@ROOT
def test_too_little_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    made = small_pack(tmp_path, files=400)
    (tmp_path / "disk").mkdir()
    script = f'mount -t tmpfs -o size=1m none disk && sh {made.parts[0].path} --dir disk/x; echo "rc $?"; ls disk'
    done = sh("-m", "sh", "-c", script, shell="unshare", cwd=tmp_path)
    if "mount:" in done.stdout:
        pytest.skip("this container may not mount")
    assert "MiB are needed in" in done.stdout and done.stdout.endswith("rc 74\n")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    made = small_pack(tmp_path, files=20)
    (tmp_path / "tiny.pagoda.source" / "model" / "big").write_bytes(bytes(1 << 20))
    place = tmp_path / "x"
    done = sh("-c", f"ulimit -f 4; sh {made.parts[0].path} --dir {place}", shell="bash")  # no file above 4 KiB
    assert done.returncode != 0 and not (place / "current").exists() and not versions(place), done.stdout


@pytest.mark.parametrize("rounds", [16])
def test_killed_at_any_moment(tmp_path: Path, rounds: int) -> None:
    """After each kill what is current is whole, and it is the old version or the new one."""
    old, new = small_pack(tmp_path, "old.pagoda"), small_pack(tmp_path, "new.pagoda", files=600)
    place = tmp_path / "x"
    assert sh(old.parts[0].path, "--dir", place).returncode == 0
    begin = time.monotonic()
    assert sh(new.parts[0].path, "--dir", tmp_path / "y").returncode == 0
    whole_s = time.monotonic() - begin
    draw = random.Random(7)
    for _ in range(rounds):
        process = subprocess.Popen(
            ["sh", str(new.parts[0].path), "--dir", str(place)], start_new_session=True, stdout=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(0.0, whole_s * 1.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert os.readlink(place / "current") in (f"versions/{old.version}", f"versions/{new.version}")
        assert sh(place / "current" / "install.sh", "--check").returncode == 0
        if os.readlink(place / "current").endswith(new.version):
            assert sh(old.parts[0].path, "--dir", place).returncode == 0
    assert sh(new.parts[0].path, "--dir", place).returncode == 0
    assert versions(place) == {old.version, new.version}
    assert {path.name for path in place.iterdir()} == {"versions", "current", "previous"}


def test_wrong_words_are_told(tmp_path: Path) -> None:
    path = small_pack(tmp_path).parts[0].path
    for words, said in (
        (("--dirr", "x"), "there is no option --dirr"),
        (("--dir",), "--dir needs a folder"),
        (("--dir", "a'b"), "holds a quote"),
        (("--rollback", "--dir", str(tmp_path)), "there is no version before this one"),
    ):
        done = sh(path, *words)
        assert done.returncode in (66, 78) and said in done.stdout
    assert "Usage" in sh(path, "--help").stdout
