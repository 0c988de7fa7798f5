"""Every route, fed what its own description allows and what it does not: no 5xx, no hang, answers as described."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest
import requests
import schemathesis
from api_fake import FakeEngine, make_server, on_port
from hypothesis import HealthCheck, Phase, settings
from schemathesis.config import SchemathesisConfig
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from pagoda.api.batch.file_store import FileStore
from pagoda.api.batch.store import BatchStore
from pagoda.api.docs import openapi
from pagoda.api.routes import endpoints
from pagoda.text.chat import load_chat_template
from pagoda.text.tokenizer import load_tokenizer
from pagoda.weights.open import open_source

# `PAGODA_FUZZ_EXAMPLES=500 pytest tests/test_api_fuzz.py` looks longer.
EXAMPLES = int(os.environ.get("PAGODA_FUZZ_EXAMPLES", "6"))
NOT_HERE = 501
config = SchemathesisConfig()
config.projects.default.generation.modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
CHECKS = [response_schema_conformance, content_type_conformance]
schema = schemathesis.openapi.from_dict(openapi(endpoints(), "test"), config=config)


@pytest.fixture(scope="module")
def url(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Real tokenizer and template, and a place for files; only the engine is the fake one."""
    source = open_source(smollm2_path)
    tokenizer = load_tokenizer(smollm2_path, source.metadata)
    template = load_chat_template(smollm2_path, source.metadata)
    source.close()
    engine = FakeEngine("ab", vocab_size=tokenizer.vocab_size, max_model_len=2048)
    files = FileStore(str(tmp_path_factory.mktemp("files")))
    server = make_server(engine, tokenizer=tokenizer, chat_template=template, batches=BatchStore(files))
    with on_port(server, engine) as base:
        yield base
    files.close()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_5xx_and_no_hang(case: schemathesis.Case, url: str) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "fake-model"  # else nearly all would end with 404
    try:
        response = case.call(base_url=url, timeout=60)
    except requests.ConnectionError:
        # A machine that stood still looks to the server like a client that sends its headers too slowly.
        response = case.call(base_url=url, timeout=60)
    assert response.status_code < 500 or response.status_code == NOT_HERE, response.text
    if response.status_code == 200:
        case.validate_response(response, checks=CHECKS)


def test_the_server_still_answers(url: str) -> None:
    assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).status_code == 200
