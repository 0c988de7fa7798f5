"""`pagoda service`: units that systemd accepts, tmux for real, a compose file that compose reads, secrets kept."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_tiny
import psutil
import pytest
import yaml

from pagoda.cli.service import last_error
from pagoda.deploy.service import service as disk
from pagoda.deploy.service import systemd
from pagoda.deploy.service.compose import compose_text, state_of
from pagoda.deploy.service.service import Service
from pagoda.errors import ConfigError

PATIENCE_S = 120
KEY = "sk-secret $1 of mine"


# The same words as the real one, for a file: nobody's own crontab is touched.
CRONTAB = """#!/bin/sh
case $1 in
  -l) cat {file} 2>/dev/null || {{ echo "no crontab for you" >&2; exit 1; }} ;;
  -r) rm {file} ;;
  *) cat > {file} ;;
esac
"""


class Machine:
    """The command, with a home and a crontab of its own."""

    def __init__(self, home: Path) -> None:
        self.services = home / "pagoda" / "services"
        self.crontab = home / "crontab.txt"
        (home / "bin").mkdir()
        (home / "bin" / "crontab").write_text(CRONTAB.format(file=self.crontab))
        (home / "bin" / "crontab").chmod(0o755)
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PAGODA_", "TMUX"))},
            "XDG_CONFIG_HOME": str(home),
            "PATH": f"{home}/bin:{os.environ['PATH']}",
            "TMUX_TMPDIR": tempfile.mkdtemp(),  # the path of a socket must be short
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_TOKEN": "hf_token",
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pagoda.cli.main", "service", *words]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=PATIENCE_S)

    def ok(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, name: str) -> dict[str, Any]:
        (told,) = json.loads(self.run("status", name, "--json").stdout)
        return dict(told)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for folder in made.services.glob("*/service.json"):
        made.run("uninstall", folder.parent.name)
    shutil.rmtree(made.environ["TMUX_TMPDIR"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def a_service(folder: Path, **changes: Any) -> Service:
    options = {"model": "/models/a b%c", "port": 80, "shutdown-timeout": 60.0}
    secrets = {"PAGODA_API_KEY": KEY}
    given = {"name": "x", "via": "systemd", "folder": folder, "options": options, "secrets": secrets, **changes}
    return Service(**given)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("user", [False, True])
def test_systemd_accepts_the_unit(tmp_path: Path, user: bool) -> None:
    service = a_service(tmp_path / "a b%c", about={} if user else {"run_as": "root"})
    manager = systemd.Systemd(user=user, units=tmp_path)
    disk.save(service, manager.files(service))
    done = subprocess.run(
        ["systemd-analyze", "verify", *(["--user"] if user else []), str(manager.unit(service))],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    about_it = [line for line in done.stderr.splitlines() if "pagoda-x" in line]
    assert not about_it and (user or done.returncode == 0), done.stderr


def test_the_unit_says_what_it_must_and_no_secret(tmp_path: Path) -> None:
    service = a_service(tmp_path / "s", about={"run_as": "me"})
    text = systemd.unit_text(service, user=False, version=254)
    assert not {"sk-secret", "PAGODA_API_KEY"} & set(text.replace("=", " ").split())
    for line in (
        "Type=notify",
        "WatchdogSec=120",
        "TimeoutStopSec=75",
        "Restart=on-failure",
        "RestartMaxDelaySec=60",
        "RestartPreventExitStatus=65 77 78",
        "User=me",
        "LimitNOFILE=65536",
        f"EnvironmentFile={tmp_path}/s/env",
        "CapabilityBoundingSet=CAP_NET_BIND_SERVICE",
        "WantedBy=multi-user.target",
    ):
        assert line in text.splitlines(), line
    # Each of these takes a GPU away, or the compiler of its kernels.
    for setting in ("PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute"):
        assert setting not in text
    of_user = systemd.unit_text(service, user=True, version=252)
    assert "User=" not in of_user and "RestartSteps" not in of_user and "Protect" not in of_user
    assert systemd.quoted('a "b" $c 100%') == '"a \\"b\\" $$c 100%%"'


def test_what_systemctl_tells() -> None:
    state = systemd.state_of({"ActiveState": "active", "MainPID": "7", "StatusText": "1 running"})
    assert (state.word, state.pid, state.detail) == ("running", 7, "1 running")
    state = systemd.state_of({"ActiveState": "failed", "SubState": "failed", "MainPID": "0", "Result": "watchdog"})
    assert (state.word, state.pid, state.detail) == ("failed", None, "failed, watchdog")
    assert systemd.state_of({"ActiveState": "inactive", "StatusText": "1 running"}).detail == ""


def test_secrets_are_private_and_come_back(tmp_path: Path) -> None:
    service = a_service(tmp_path / "s")
    service.folder.mkdir()
    service.secrets_path.write_text("older, and open to all")
    service.secrets_path.chmod(0o644)
    disk.save(service, {})
    assert service.secrets_path.stat().st_mode & 0o777 == 0o600
    assert disk.read_secrets(service.secrets_path) == {"PAGODA_API_KEY": KEY}
    assert KEY not in service.options_path.read_text() + (service.folder / "service.json").read_text()
    assert disk.load(service.folder).options == service.options


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("install", "M", "--via", "systemd"), "Use tmux: --via tmux"),
        (("install", "M", "--via", "rope"), "systemd, tmux, compose"),
        (("install", "M", "--via", "tmux", "--port", "0"), "--port 8000"),
        (("install", "M", "--via", "tmux", "--name", "A b"), "small letters"),
        (("install", "M", "--via", "tmux", "--gpus", "all"), "for --via compose"),
        (("install", "M", "--via", "tmux", "--prot", "1"), "--port"),
        (("install", "./nowhere", "--via", "tmux"), "./nowhere".removeprefix("./")),
        (("start", "nobody"), "There is no service nobody"),
        (("strat",), "install, start, stop"),
        (("logs",), "There is no service yet"),
    ],
)
def test_refusals_name_the_cure(machine: Machine, smollm2_path: str, words: tuple[str, ...], needle: str) -> None:
    if "systemd" in words and Path("/run/systemd/system").is_dir():
        pytest.skip("systemd runs here")
    done = machine.run(*(smollm2_path if word == "M" else word for word in words))
    assert done.returncode in (65, 78) and needle in done.stderr and "Traceback" not in done.stderr
    assert not list(machine.services.glob("*"))


def test_a_name_is_made_from_the_models() -> None:
    assert disk.name_for("./Qwen3-0.6B/") == "qwen3-0-6b"
    assert disk.name_for("Qwen/Qwen3-0.6B-GGUF:Q8_0") == "qwen3-0-6b-gguf"
    assert disk.name_for("模型") == "model"
    assert disk.check_name(disk.name_for("a" * 99))


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_tmux_from_install_to_uninstall(machine: Machine, smollm2_path: str) -> None:
    machine.crontab.write_text("0 3 * * * theirs\n")
    port = free_port()
    words = ("--port", str(port), "--max-model-len", "256", "--threads", "1", "--api-key", KEY)
    shown = machine.ok("install", smollm2_path, "--via", "tmux", "--name", "smol", *words)
    assert f"port: {port}" in shown and KEY not in shown
    assert machine.status("smol")["state"] == "stopped"
    # As cron does it after a reboot: a shell, and next to no environment.
    assert "It starts at boot" in shown
    theirs, line = machine.crontab.read_text().splitlines()
    assert theirs == "0 3 * * * theirs" and line.endswith(" # pagoda service smol")
    bare = {"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin"}
    started = line.removeprefix("@reboot ").replace("\\%", "%")
    assert subprocess.run(["/bin/sh", "-c", started], env=bare, timeout=PATIENCE_S, check=False).returncode == 0
    assert f"smol answers at http://127.0.0.1:{port}/v1" in machine.ok("start", "smol")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 401
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert connection.getresponse().status == 200
    first = machine.status("smol")
    assert first["state"] == "running" and first["memory_bytes"] > 50 << 20 and first["last_error"] == ""
    # Of a user who may not read the key.
    secrets = machine.services / "smol" / "env"
    secrets.rename(secrets.with_name("away"))
    told = machine.status("smol")
    secrets.with_name("away").rename(secrets)
    assert told["state"] == "running" and "needs an API key" in told["detail"] and told["memory_bytes"] is None
    # Nobody sees the key in the list of processes.
    server = psutil.Process(first["pid"])
    assert KEY not in " ".join(" ".join(p.cmdline()) for p in [server, *server.parents(), *server.children(True)])

    server.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while (now := machine.status("smol"))["state"] != "running" or now["pid"] == first["pid"]:
        assert time.monotonic() < deadline
    assert "signal SIGKILL" in now["last_error"]
    assert "starts again in 1 s" in machine.ok("logs", "-n", "200")

    machine.ok("stop")
    assert machine.status("smol")["state"] == "stopped" and not psutil.pid_exists(now["pid"])
    assert "its model is still there" in machine.ok("uninstall", "smol")
    assert not (machine.services / "smol").exists() and Path(smollm2_path).exists()
    assert machine.crontab.read_text() == "0 3 * * * theirs\n"


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_tmux_says_why_a_server_does_not_start(machine: Machine, smollm2_path: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        machine.ok("install", smollm2_path, "--via", "tmux", "--name", "smol", "--port", port)
        # A wrong option is no reason to try again.
        options = machine.services / "smol" / "serve.yaml"
        options.write_text(options.read_text() + "prot: 1\n")
        done = machine.run("start", "smol")
    assert done.returncode == 78 and "unknown option prot" in done.stderr and "would not help" in done.stderr
    assert machine.status("smol")["state"] == "failed"


def test_without_crontab_install_says_that_nothing_starts_it(machine: Machine, smollm2_path: str) -> None:
    (machine.services.parent.parent / "bin" / "crontab").write_text("#!/bin/sh\necho you may not >&2; exit 1\n")
    shown = machine.ok("install", smollm2_path, "--via", "tmux", "--name", "smol", "--port", "8300")
    assert "Nothing starts it at boot: crontab -l failed: you may not." in shown
    machine.ok("uninstall", "smol")


def test_a_supervised_server_that_hangs_is_started_again(tmp_path: Path, smollm2_path: str) -> None:
    port = free_port()
    service = Service(
        name="s", via="tmux", folder=tmp_path, options={"model": smollm2_path, "port": port, "max-model-len": 256}
    )
    disk.save(service, {})
    code = (
        "import sys; from pathlib import Path; from pagoda.deploy.service.supervise import Supervisor, load\n"
        "sys.exit(Supervisor(load(Path(sys.argv[1])), watchdog_s=4, backoff_s=0.1).run())"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    keeper = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environ, stdout=subprocess.DEVNULL)

    def running(after: int = 0) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                told = json.loads((tmp_path / "state.json").read_text())
                if told["word"] == "running" and told["pid"] not in (None, after):
                    return int(told["pid"])
            time.sleep(0.05)
        raise TimeoutError

    try:
        first = running()
        os.kill(first, signal.SIGSTOP)
        second = running(after=first)
        assert not psutil.pid_exists(first)
        assert "no sign of life for 4 s" in (tmp_path / "server.log").read_text()
        keeper.send_signal(signal.SIGTERM)
        assert keeper.wait(PATIENCE_S) == 0 and not psutil.pid_exists(second)
        assert json.loads((tmp_path / "state.json").read_text())["word"] == "stopped"
    finally:
        keeper.kill()
        keeper.wait()


def compose_command() -> list[str] | None:
    if shutil.which("docker"):
        if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
            return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def test_compose_reads_the_file(machine: Machine, smollm2_path: str, tmp_path: Path) -> None:
    many = ("--gpus", "0,1", "--replicas", "2", "--host", "0.0.0.0", "--port", "8100")
    machine.ok("install", smollm2_path, "--via", "compose", "--name", "one", *many, "--api-key", KEY)
    machine.ok("install", smollm2_path, "--via", "compose", "--name", "two", "--port", "8200")
    path = machine.services / "compose.yaml"
    assert KEY not in path.read_text()
    file = yaml.safe_load(path.read_text())
    if command := compose_command():
        done = subprocess.run([*command, "-f", str(path), "config"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        read = yaml.safe_load(done.stdout)
        assert read["services"]["one"]["environment"]["PAGODA_API_KEY"].replace("$$", "$") == KEY
        assert read["services"]["one"]["deploy"]["replicas"] == 2
    one, two = file["services"]["one"], file["services"]["two"]
    (device,) = one["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["0", "1"] and "count" not in device
    assert one["ports"] == ["8100-8101:8000"] and two["ports"] == ["127.0.0.1:8200:8000"]
    for each in (one, two):
        assert each["healthcheck"] and each["logging"]["options"]["max-size"] and each["read_only"]
        assert any(v.startswith(f"{smollm2_path}:/models/") and v.endswith(":ro") for v in each["volumes"])
    inside = yaml.safe_load((machine.services / "one" / "container.yaml").read_text())
    assert inside["model"] == f"/models/one/{Path(smollm2_path).name}" and inside["served-model-name"] == [smollm2_path]
    assert "HF_TOKEN=hf_token" in (machine.services / "one" / "env").read_text()
    assert "PYTHONPATH" not in (machine.services / "one" / "env").read_text()

    machine.ok("uninstall", "one")
    assert set(yaml.safe_load(path.read_text())["services"]) == {"two"}
    machine.ok("uninstall", "two")
    assert not path.exists()


def test_several_models_in_one_service(machine: Machine, smollm2_path: str, tmp_path: Path) -> None:
    tiny = engine_tiny.write(tmp_path / "tiny")
    config = tmp_path / "models.yaml"
    listed = [smollm2_path, {"model": tiny, "served-model-name": "tiny", "keep-alive": "1h"}]
    config.write_text(yaml.safe_dump({"models": listed, "port": 8300}))
    machine.ok("install", "--config", str(config), "--via", "compose", "--name", "both")
    inside = yaml.safe_load((machine.services / "both" / "container.yaml").read_text())
    first, second = inside["models"]
    assert first == {"model": f"/models/both/0/{Path(smollm2_path).name}", "served-model-name": [smollm2_path]}
    assert second == {"model": "/models/both/1", "served-model-name": "tiny", "keep-alive": "1h"}
    volumes = yaml.safe_load((machine.services / "compose.yaml").read_text())["services"]["both"]["volumes"]
    assert f"{smollm2_path}:{first['model']}:ro" in volumes and f"{tiny}:/models/both/1:ro" in volumes
    machine.ok("uninstall", "both")


def test_compose_mounts_all_of_a_cache_whose_files_are_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    service = Service(name="x", via="compose", folder=tmp_path / "x", options={"model": str(snapshot)})
    volumes = yaml.safe_load(compose_text([service]))["services"]["x"]["volumes"]
    assert f"{tmp_path}/models--a--b:/models/x:ro" in volumes


def test_what_docker_tells() -> None:
    assert state_of(["running", "9", "2026-01-31T12:00:00.1234Z", "starting"]).word == "starting"
    state = state_of(["running", "9", "2026-01-31T12:00:00.1234Z", "healthy"])
    assert (state.word, state.pid, state.detail) == ("running", 9, "healthy")
    assert state_of(["exited", "0", "2026-01-31T12:00:00Z"]).word == "stopped"
    # Made, and then something kept it from starting.
    assert state_of(["created", "0", "0001-01-01T00:00:00Z", "starting"]).word == "stopped"


@pytest.mark.parametrize(
    "words",
    [
        "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "docker.errors.DockerException: Error while fetching server API version: ('Connection aborted.', ...)",
        "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
    ],
)
def test_a_docker_that_does_not_answer(words: str) -> None:
    with pytest.raises(ConfigError, match="Docker does not answer") as caught:
        disk.call("sh", "-c", 'echo "$0" >&2; exit 1', words)
    assert "systemctl start docker" in caught.value.remedy


def test_the_words_of_docker_that_say_why(tmp_path: Path) -> None:
    said = "Creating x\n\nERROR: for x  Cannot start service x: no such device\nEncountered errors while bringing up."
    with pytest.raises(ConfigError, match="sh failed: ERROR: for x  Cannot start service x: no such device"):
        disk.call("sh", "-c", f"printf '{said}' >&2; exit 1")


def test_the_last_error_of_a_log() -> None:
    log = ["2026-01-31 12:00:00 error   one", "2026-01-31 12:00:01 error   two", "2026-01-31 12:00:02 info    three"]
    assert last_error(log).endswith("two")
    assert last_error(["x.service: Main process exited, code=killed, status=9/KILL", "Started x."]).startswith("x.ser")
    assert last_error(["all is well"]) == ""
