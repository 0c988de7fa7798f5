"""The clients' packages for JavaScript, where they are installed (`make test-agents`), against a real small model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from server_process import running, serve

SCRIPT = Path(__file__).parent / "clients" / "packages.mjs"


def test_packages(smollm2_path: str, tmp_path: Path) -> None:
    node, packages = shutil.which("node"), os.environ.get("NPM_CLIENTS", "")
    if node is None or not Path(packages, "openai").is_dir():
        pytest.skip("the packages of tests/clients/npm.txt are not installed")
    script = shutil.copy(SCRIPT, tmp_path)  # packages are looked for beside it
    (tmp_path / "node_modules").symlink_to(Path(packages).absolute())
    environ = {"PAGODA_CACHE": str(tmp_path / "cache")}
    command = serve(str(smollm2_path), "--served-model-name", "smollm2", "--max-model-len", "2048")
    with running(*command, environ=environ) as url:
        done = subprocess.run([node, script, url, "smollm2"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failed"] == {} and told["tried"] == 26
