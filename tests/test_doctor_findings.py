"""`pagoda doctor`: each fact that would stop or slow serving becomes a finding with its cure."""

from __future__ import annotations

import email.utils
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pagoda.backend.cpu import library
from pagoda.cli.main import main
from pagoda.deploy import doctor, probe
from pagoda.deploy.findings import Finding, problems

GIB = 1 << 30
GPU = "0, NVIDIA GeForce RTX 4090 D, 24564, 20480, 550.54.14, GPU-aaaa"
IDLE = "1, NVIDIA GeForce RTX 4090 D, 24564, 3, 550.54.14, GPU-bbbb"


def one(findings: Iterable[Finding], level: str) -> Finding:
    found = [finding for finding in findings if finding.level == level]
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, holders: str, code: int = 0) -> None:
    """A stand-in that answers the three questions of the probe."""
    program = folder / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\ncase \"$1\" in\n*query-gpu*) printf '{gpus}';;\n*compute-apps*) printf '{holders}';;\n"
        f"*) echo '| NVIDIA-SMI 550.54.14   Driver Version: 550.54.14   CUDA Version: 12.4 |';;\nesac\nexit {code}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_and_who_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, f"{GPU}\\n{IDLE}\\n", "GPU-aaaa, 1, 19000\\n")
    found = probe.nvidia_gpus()
    assert found.cuda == "12.4" and [gpu.total_mib for gpu in found.gpus] == [24564, 24564]
    findings = list(doctor.gpus(found, has_device=True))
    held = one(findings, "note")
    assert "process 1, 19000 MiB" in held.text and "driver 550.54.14, CUDA up to 12.4" in held.text
    assert "kill 1" in held.cure and "CUDA_VISIBLE_DEVICES" in held.cure and "below 0.17" in held.cure
    assert "3 of 24564 MiB" in one(findings, "ok").text


def test_holders_that_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, f"{GPU}\\n", "")
    assert "fuser" in one(doctor.gpus(probe.nvidia_gpus(), has_device=True), "note").cure


def test_a_driver_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "Failed to initialize NVML: Driver/library version mismatch", "", 18)
    finding = one(doctor.gpus(probe.nvidia_gpus(), has_device=True), "note")
    assert "Driver/library version mismatch" in finding.text and "restart" in finding.cure


def test_no_driver() -> None:
    assert "--gpus all" in one(doctor.gpus(probe.Gpus(), has_device=True), "note").cure
    assert "CPU" in one(doctor.gpus(probe.Gpus(), has_device=False), "ok").text


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        finding = one(doctor.listening(port, probe.port_owner(port)), "problem")
        assert "python" in finding.text or "pytest" in finding.text
        assert f"--port {port + 1}" in finding.cure
    assert "free" in one(doctor.listening(port, probe.port_owner(port)), "ok").text


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({"http_proxy": "http://p:1"}, "note"),
        ({"ALL_PROXY": "socks5://p:1", "NO_PROXY": "localhost"}, "note"),
        ({"http_proxy": "http://p:1", "no_proxy": "localhost, 127.0.0.1"}, "ok"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*"}, "ok"),
    ],
)
def test_proxies(environ: dict[str, str], level: str) -> None:
    finding = one(doctor.proxies(environ), level)
    assert level == "ok" or "NO_PROXY=localhost,127.0.0.1" in finding.cure
    assert "p:1" not in finding.text  # an address may hold a password


def test_no_proxy_is_nothing_to_say() -> None:
    assert not list(doctor.proxies({"NO_PROXY": "x", "https_proxy": "http://p:1"}))


@pytest.mark.parametrize(("hard", "level"), [(100, "problem"), (1024, "note"), (65536, "ok"), (-1, "ok")])
def test_open_files(hard: int, level: str) -> None:
    assert resource.RLIM_INFINITY == -1
    finding = one(doctor.open_files((64, hard)), level)
    assert level == "ok" or "ulimit -Hn" in finding.cure


@pytest.mark.parametrize(("free", "level"), [(GIB // 4, "problem"), (GIB, "note"), (8 * GIB, "ok")])
def test_memory(free: int, level: str) -> None:
    one(doctor.memory(free, 16 * GIB), level)


@pytest.mark.parametrize(("now", "drift", "level"), [(0.0, 0.0, "problem"), (2e9, 0.0, "ok"), (2e9, 3.0, "note")])
def test_clock(now: float, drift: float, level: str) -> None:
    assert level == "ok" or "set-ntp" in one(doctor.clock(now, drift), level).cure


def test_drift_of_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(probe.clock_drift(0.01)) < 0.5
    times = iter([1000.0, 5000.0])
    monkeypatch.setattr(time, "time", lambda: next(times))
    assert probe.clock_drift(0.01) > 3000


class Site(BaseHTTPRequestHandler):
    """Answers by path; its clock is an hour before ours at /past, two at /two-hours-past."""

    def do_HEAD(self) -> None:
        if self.path == "/hang":
            time.sleep(1)
        self.send_response_only(403 if self.path == "/refuses" else 200)
        then = time.time() - {"/past": 3600, "/two-hours-past": 7200}.get(self.path, 0)
        self.send_header("Date", email.utils.formatdate(then, usegmt=True))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.alone
def test_places_are_asked_at_once_and_never_for_long(site: str) -> None:
    urls = {"good": f"{site}/", "refuses": f"{site}/refuses", "hangs": f"{site}/hang", "gone": "http://127.0.0.1:9"}
    started = time.monotonic()
    answers = {answer.name: answer for answer in probe.ask(urls, 0.3)}
    assert time.monotonic() - started < 1
    assert {name: answer.reached for name, answer in answers.items()} == {
        "good": True,
        "refuses": True,
        "hangs": False,
        "gone": False,
    }
    assert "refused" in answers["gone"].error


def test_what_answers_mean(site: str) -> None:
    findings = list(doctor.network(probe.ask({"Hugging Face": "http://127.0.0.1:9", "other": f"{site}/past"}, 1.0)))
    assert "HF_ENDPOINT=https://hf-mirror.com" in findings[0].cure
    assert findings[1].level == "ok"
    assert findings[2].topic == "clock" and "60 minutes fast" in findings[2].text


def test_the_hub_finds_a_clock_two_hours_off(site: str) -> None:
    """Though another place, which may share our clock, agrees with it; both run in the doctor that a user types."""
    command = (sys.executable, "-m", "pagoda.cli.main", "doctor", "--json")
    places = {"HF_ENDPOINT": f"{site}/two-hours-past", "MODELSCOPE_ENDPOINT": site, "PIP_INDEX_URL": site}
    environ = {**os.environ, **places, "PYTHONPATH": os.pathsep.join(sys.path), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    found = [f["text"] for f in json.loads(done.stdout)["findings"] if f["topic"] == "clock" and f["level"] == "note"]
    assert found == [f"it is 120 minutes fast, by the clock of {site.removeprefix('http://')}"]


def test_a_certificate_that_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ssl.SSLCertVerificationError("certificate is not yet valid")

    monkeypatch.setattr(probe.urllib.request, "urlopen", refuse)
    finding = one(doctor.network(probe.ask({"ModelScope": "https://example.org"}, 0.3)), "note")
    assert (
        "certificate is not yet valid" in finding.text and "clock" in finding.cure and "SSL_CERT_FILE" in finding.cure
    )


def test_sources_that_are_asked() -> None:
    found = doctor.places({"HF_ENDPOINT": "https://hf-mirror.com/", "PIP_INDEX_URL": "https://u:secret@host/simple"})
    assert found["HF_ENDPOINT"] == "https://hf-mirror.com" and found["Hugging Face"] == "https://huggingface.co"
    answers = [probe.Answer(name, url, True) for name, url in found.items()]
    assert not any("secret" in finding.text for finding in doctor.network(answers))


def test_a_cache_that_may_not_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not problems(doctor.storage({}))
    monkeypatch.setattr(probe, "writable", lambda folder: folder != cache)
    finding = one(doctor.storage({}), "problem")
    assert str(cache) in finding.text and "PAGODA_CACHE" in finding.cure
    cache.rmdir()
    cache.write_text("a file")
    assert "cannot be made" in one(doctor.storage({}), "problem").text


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert "Make room" in one(doctor.storage({}), "problem").cure


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system is known here")
def test_caches_on_two_disks(cache: Path) -> None:
    if Path("/dev/shm").stat().st_dev == cache.parent.stat().st_dev:
        pytest.skip("one file system")
    both = list(doctor.storage({"HF_HOME": "/dev/shm/pagoda-is-not-there"}))
    assert ["/dev/shm" in found.text for found in both] == [True, False]
    assert len(list(doctor.storage({"HF_HOME": str(cache / "hf")}))) == 1


def test_writable_looks_at_what_is_there(tmp_path: Path) -> None:
    assert probe.writable(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    assert not probe.writable(tmp_path / "file" / "below")


def test_the_processor() -> None:
    findings = list(doctor.cpu())
    assert findings[0].level == "ok" and "kernels" in findings[0].text
    assert "threads" in findings[1].text


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_CPU_ISA", "no-such")
    assert "Unset PAGODA_CPU_ISA" in one(doctor.cpu(), "problem").cure
    monkeypatch.setattr(library, "__file__", "/nowhere/library.py")
    assert "Install the package again" in one(doctor.cpu(), "problem").cure


def test_the_command(cache: Path, capsys: pytest.CaptureFixture[str], site: str) -> None:
    port = int(site.rpartition(":")[2])
    assert main(["doctor", "--offline", "--port", str(port)]) == 1
    out = capsys.readouterr().out
    assert f"{port} is taken" in out and f"-> Use another one: --port {port + 1}" in out and "network" not in out
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    assert main(["doctor", "--offline", "--json", f"--port={free}"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {"cpu", "memory", "gpu", "disk", "port", "files", "clock"} <= {f["topic"] for f in told["findings"]}


@pytest.mark.parametrize("words", [["--port", "x"], ["--port", "70000"], ["word"], ["--what"]])
def test_wrong_usage(words: list[str]) -> None:
    assert main(["doctor", *words]) == 78
