"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from api_fake import Client, FakeEngine, make_server

from pagoda.deploy.download.default_model import default_model_path
from pagoda.errors import ModelError

# Triton reads this when a kernel is defined: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """What is imported now stays: no search for garbage (each executor ends with one) walks through it again."""
    _make_triton_quick()
    gc.collect()
    gc.freeze()


def _make_triton_quick() -> None:
    """Its interpreter changes the language anew for each call of a function, which takes most of its time."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        language = interpreter.tl
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
        interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """The default model's GGUF file. Skips where it cannot be fetched; in CI that is a failure."""
    try:
        return default_model_path()
    except ModelError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[Client]:
    with Client(make_server(engine)) as made:
        yield made
