"""The package `cohere`: reranking on both versions' paths."""

from __future__ import annotations

from typing import Any

import cohere
import pytest

DOCUMENTS = ["The tower is tall.", "Cats like milk.", "A kitten drinks from a bowl."]


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
@pytest.mark.parametrize("base", ["", "/v1"])  # RAGFlow's base URL ends with /v1: then it asks /v1/v1/rerank
def test_rerank(minilm: str, kind: Any, base: str) -> None:
    found = kind("key", base_url=minilm + base).rerank(
        model="minilm", query="What does a cat eat?", documents=DOCUMENTS, top_n=2
    )
    assert found.results[0].index == 1 and len(found.results) == 2
    assert 1 >= found.results[0].relevance_score >= found.results[1].relevance_score >= 0
