"""Embedding, reranking and scoring over HTTP with a real engine, through the clients that people use."""

from __future__ import annotations

import base64
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import ollama
import openai
import pytest
import sentence_transformers
import torch
import transformers
from api_fake import on_port
from langchain_openai import OpenAIEmbeddings
from pooled_models import hidden_states, minilm_folder, write_model, write_sentence_files

from pagoda.api.serving.server import Server
from pagoda.cli.serve import make_server
from pagoda.engine.client import EngineClient
from pagoda.options.config import Options
from pagoda.text.rerank import judged, pair_tokens
from pagoda.text.tokenizer import Cut, load_tokenizer

QUERY = "the cat"
DOCUMENTS = ["a pagoda is a tower", "the cat sat on the mat", "the mat"]


@contextmanager
def served(path: Path, **options: Any) -> Iterator[tuple[str, Server, EngineClient]]:
    chosen = Options(model=str(path), served_model_name=("m",), **options)
    engine = EngineClient(chosen.engine_config(str(path)))
    server = make_server(chosen, str(path), engine)
    with on_port(server, engine) as url:  # type: ignore[arg-type]
        yield url, server, engine


@pytest.fixture(scope="module")
def minilm_path() -> Path:
    return minilm_folder()


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> Iterator[str]:
    with served(minilm_path) as (url, _, _):
        yield url


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("ranker")
    write_model(path, "bert", transformers.AutoModelForSequenceClassification, num_labels=1)
    with served(path) as (url, _, _):
        yield url


def post(url: str, path: str, **body: Any) -> Any:
    reply = httpx.post(url + path, json=body, timeout=60)
    return reply.json() if reply.status_code == 200 else (reply.status_code, reply.json())


def test_minilm_equals_sentence_transformers(minilm: str, minilm_path: Path) -> None:
    texts = ["A pagoda is a tower.", "Ünïcödé, 数字 and 🙂", "", "so long " * 50, "The quick brown fox " * 40]
    expected = sentence_transformers.SentenceTransformer(str(minilm_path), device="cpu").encode(texts)
    client = openai.OpenAI(base_url=minilm + "/v1", api_key="EMPTY", max_retries=0)
    made = client.embeddings.create(model="m", input=texts)  # in base64, as the client asks by itself
    found = np.array([each.embedding for each in made.data])
    assert (found * expected).sum(axis=1).min() > 0.99999
    assert made.model == "m" and [each.index for each in made.data] == list(range(5))
    assert made.usage.prompt_tokens == made.usage.total_tokens > 250
    floats = client.embeddings.create(model="m", input=texts, encoding_format="float")
    assert np.array_equal(np.array([each.embedding for each in floats.data], np.float32), found.astype(np.float32))


def test_inputs_of_all_kinds(minilm: str) -> None:
    one = post(minilm, "/v1/embeddings", input="hello world", encoding_format="base64")["data"][0]["embedding"]
    values = np.frombuffer(base64.b64decode(one), "<f4")
    assert values.shape == (384,) and abs(np.linalg.norm(values) - 1) < 1e-5
    ids = [101, 7592, 2088, 102]
    for given in (["hello world"], ids, [ids]):
        (found,) = post(minilm, "/v1/embeddings", input=given, model="m")["data"]
        assert np.array_equal(np.array(found["embedding"], np.float32), values)
    assert len(post(minilm, "/embeddings", input=["hi"] * 600)["data"]) == 600


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "input is required"),
        ({"input": []}, "input is empty"),
        ({"input": [[]]}, "an input is empty"),
        ({"input": ["a", 1]}, "input must be a text"),
        ({"input": {"a": 1}}, "input must be a string or a list"),
        ({"input": [100000]}, "outside 0..30521. Token ids must be those of .*check_embedding_ctx_length=False"),
        ({"input": "hi " * 300}, "maximum context length is 256 tokens, but the prompt holds 302"),
        ({"input": "hi", "dimensions": 64}, "not trained for vectors of other lengths than 384"),
        ({"input": "hi", "prompt_name": "query"}, "'query' is no prompt of this model. It has: none"),
        ({"input": "hi", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens must be -1"),
        ({"input": "hi", "encoding_format": "int8"}, "encoding_format has a value that is not allowed"),
    ],
)
def test_what_is_wrong_is_said(body: dict[str, Any], said: str, minilm: str) -> None:
    status, reply = post(minilm, "/v1/embeddings", **body)
    assert status == 400
    assert re.search(said, reply["error"]["message"]), reply


def test_truncation_keeps_the_beginning_and_the_end_token(minilm: str) -> None:
    long = post(minilm, "/v1/embeddings", input="hi " * 300, truncate_prompt_tokens=-1)
    assert long["usage"]["prompt_tokens"] == 256
    cut = post(minilm, "/v1/embeddings", input="hi there all", truncate_prompt_tokens=4, encoding_format="float")
    assert cut["data"][0] == post(minilm, "/v1/embeddings", input="hi there")["data"][0]


def test_the_side_that_is_cut(minilm: str, ranker: str) -> None:
    """What is left of a cut text counts like that text alone; token ids are cut where they are."""
    left = {"truncate_prompt_tokens": 4, "truncation_side": "left"}
    for path, what in (("/v1/embeddings", "embedding"), ("/pooling", "data")):
        for given, kept in (("far too much hi there", "hi there"), ([9, 101, 7592, 2088, 102], "hello world")):
            found, alone = post(minilm, path, input=given, **left), post(minilm, path, input=kept)
            assert found["data"][0][what] == alone["data"][0][what] and found["usage"]["prompt_tokens"] == 4
    far = {"truncate_prompt_tokens": -1, "truncation_side": "left"}
    assert (
        post(minilm, "/v1/embeddings", input="word " * 10**5 + "hi " * 254, **far)["data"][0]
        == (post(minilm, "/v1/embeddings", input="hi " * 254)["data"][0])
    )
    document = "the cat " * 200 + "sat on a mat"
    most = 2 + 4 + 3  # the query, the last four words, what frames both
    for side, kept in (("left", "sat on a mat"), ("right", "the cat the cat"), (None, "the cat the cat")):
        cut = {"truncate_prompt_tokens": most, "truncation_side": side}
        asked, alone = {"query": QUERY, "documents": [document]}, {"query": QUERY, "documents": [kept]}
        scores = [
            post(ranker, "/rerank", **each)["results"][0]["relevance_score"] for each in ({**asked, **cut}, alone)
        ]
        pair = post(ranker, "/score", text_1=QUERY, text_2=document, **cut)["data"][0]["score"]
        assert scores == [pair, pair], side
        classes = [
            post(ranker, "/classify", input=t, **c)["data"]
            for t, c in ((document, {**cut, "truncate_prompt_tokens": 6}), (kept, {}))
        ]
        assert classes[0] == classes[1]
    assert post(ranker, "/rerank", query="a", documents=["b"], truncation_side="middle")[0] == 400


def test_the_question_of_a_judge_is_cut_last(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3")
    tokenizer = load_tokenizer(str(tmp_path), {})
    before, text, behind = (tokenizer.encode(part, add_special_tokens=False) for part in judged("the cat", "", "why"))
    document = tokenizer.encode(" ".join(DOCUMENTS), add_special_tokens=False)
    most = len(before) + len(text) + 4 + len(behind)
    for cut, kept in ((Cut(most), document[:4]), (Cut(most, "left"), document[-4:])):
        ids, _ = pair_tokens(tokenizer, "qwen3", "the cat", " ".join(DOCUMENTS), cut, "why")
        assert ids == [*before, *text, *kept, *behind]
    short, _ = pair_tokens(tokenizer, "qwen3", "the cat", "a mat", Cut(most - 6, "left"), "why")
    assert short == [*before, *text[:-2], *behind]


def test_routes_for_other_models_say_so(minilm: str, ranker: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat"):
        status, reply = post(minilm, path, model="m", messages=[])
        assert status == 400 and "the model m makes embeddings, and cannot generate text" in str(reply)
    status, reply = post(ranker, "/v1/embeddings", input="hi")
    assert status == 400 and "scores or classifies texts, and cannot make embeddings" in reply["error"]["message"]
    assert post(minilm, "/v1/embeddings", model="other", input="hi")[0] == 404


def test_ollama(minilm: str) -> None:
    client = ollama.Client(host=minilm, timeout=30)
    found = client.embed("m", ["hello world", "hi " * 400])
    assert len(found.embeddings) == 2 and found.prompt_eval_count == 4 + 256
    values = post(minilm, "/v1/embeddings", input="hello world")["data"][0]["embedding"]
    assert list(found.embeddings[0]) == values and list(client.embeddings("m", "hello world").embedding) == values
    with pytest.raises(ollama.ResponseError, match="maximum context length is 256"):
        client.embed("m", "hi " * 400, truncate=False)
    shown = client.show("m")
    assert shown.capabilities == ["embedding"] and (shown.modelinfo or {})["bert.embedding_length"] == 384
    with pytest.raises(ollama.ResponseError, match="cannot generate text"):
        client.chat("m", [{"role": "user", "content": "Hi"}])


def test_langchain(minilm: str) -> None:
    client = OpenAIEmbeddings(model="m", base_url=minilm + "/v1", api_key="EMPTY", check_embedding_ctx_length=False)  # type: ignore[call-arg]
    found = client.embed_documents(["hello world", "hi"])
    assert client.embed_query("hello world") == found[0] and len(found[1]) == 384


def test_cohere_and_the_many_paths(ranker: str) -> None:
    for client in (cohere.ClientV2("key", base_url=ranker), cohere.Client("key", base_url=ranker)):
        ranked = client.rerank(model="m", query=QUERY, documents=DOCUMENTS, top_n=2).results
        scores = [each.relevance_score for each in ranked]
        assert len(ranked) == 2 and scores == sorted(scores, reverse=True) and all(0 < s < 1 for s in scores)
    whole = post(ranker, "/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=None)
    assert sorted(each["index"] for each in whole["results"]) == [0, 1, 2] and whole["usage"]["total_tokens"] > 20
    assert all(each["document"] == {"text": DOCUMENTS[each["index"]]} for each in whole["results"])
    for path in ("/rerank", "/v2/rerank", "/v1/v1/rerank", "/api/rerank"):
        texts = [{"text": each} for each in DOCUMENTS]
        again = post(ranker, path, query=QUERY, documents=texts, top_n=0, return_documents="true", return_len="true")
        assert [r["relevance_score"] for r in again["results"]] == [r["relevance_score"] for r in whole["results"]]
        document = again["results"][0]["document"]
        assert isinstance(document, str) == (path == "/api/rerank")
    bare = post(ranker, "/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=9, return_documents=False)
    assert len(bare["results"]) == 3 and "document" not in bare["results"][0]


def test_scores_are_those_of_the_pairs(tmp_path: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    model = write_model(tmp_path, "bert", kind, num_labels=1)
    with served(tmp_path) as (url, _, _):
        found = post(url, "/v1/score", text_1=QUERY, text_2=DOCUMENTS)
        pairs = post(url, "/score", queries=[QUERY] * 3, documents=DOCUMENTS)
        bare = post(url, "/score", data_1=QUERY, data_2=DOCUMENTS, use_activation=False)["data"]
        assert post(url, "/score", queries=QUERY, items=DOCUMENTS)["data"] == found["data"]
        assert post(url, "/score", text_1=["a", "b"], text_2=DOCUMENTS)[0] == 400
    assert [each["score"] for each in pairs["data"]] == [each["score"] for each in found["data"]]
    encoder = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    encoded = [encoder(QUERY, text, return_tensors="pt", return_token_type_ids=True) for text in DOCUMENTS]
    expected = [model(**each).logits.sigmoid().item() for each in encoded]
    assert any(each["token_type_ids"].any() for each in encoded)
    np.testing.assert_allclose([each["score"] for each in found["data"]], expected, rtol=1e-4)
    np.testing.assert_allclose(1 / (1 + np.exp([-each["score"] for each in bare])), expected, rtol=1e-4)


def test_classes_and_poolings_are_those_of_transformers(tmp_path: Path, minilm: str) -> None:
    labels = {0: "bad", 1: "so-so", 2: "good"}
    model = write_model(
        tmp_path, "bert", transformers.AutoModelForSequenceClassification, num_labels=3, id2label=labels
    )
    tokenizer = load_tokenizer(str(tmp_path), {})
    texts = ["the cat sat on the mat", "a pagoda is a tower", "the mat"]
    expected = []
    for text in texts:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(text)])).logits
        expected.append(torch.softmax(logits[0].double(), -1).numpy())
    with served(tmp_path) as (url, _, _):
        for path in ("/classify", "/v1/classify"):
            reply = post(url, path, input=texts)
            assert reply["object"] == "list" and reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] > 10
            assert [each["index"] for each in reply["data"]] == [0, 1, 2]
            for each, probs in zip(reply["data"], expected, strict=True):
                np.testing.assert_allclose(each["probs"], probs, atol=2e-3)
                assert each["label"] == labels[int(np.argmax(each["probs"]))] and each["num_classes"] == 3
        pooled = post(url, "/pooling", input=texts[0], task="classify")["data"][0]
        assert pooled["object"] == "pooling" and np.allclose(pooled["data"], expected[0], atol=2e-3)
        (bare,) = post(url, "/classify", input=texts[0], use_activation=False)["data"]
        assert np.allclose(np.exp(bare["probs"]) / np.exp(bare["probs"]).sum(), expected[0], atol=2e-3)
        assert abs(sum(bare["probs"]) - 1) > 1e-3
        assert (
            post(url, "/pooling", input="x", task="embed")[0]
            == post(url, "/rerank", query="a", documents=["b"])[0]
            == 400
        )
    whole = post(minilm, "/v1/embeddings", input=texts)["data"]
    assert [each["data"] for each in post(minilm, "/pooling", input=texts)["data"]] == [e["embedding"] for e in whole]
    (raw,) = post(minilm, "/pooling", input=texts[:1], encoding_format="base64", task="embed")["data"]
    assert np.frombuffer(base64.b64decode(raw["data"]), "<f4").tolist() == pytest.approx(whole[0]["embedding"])
    long = float(np.linalg.norm(post(minilm, "/pooling", input="a cat", use_activation=False)["data"][0]["data"]))
    assert abs(long - 1) > 0.01 and post(minilm, "/classify", input="x")[0] == 400
    assert post(minilm, "/pooling", input="x", task="token_embed")[1]["error"]["param"] == "task"


def test_documents_are_cut_where_that_is_asked_for(ranker: str) -> None:
    status, reply = post(ranker, "/v1/rerank", query=QUERY, documents=["the cat " * 200])
    assert status == 400 and "maximum context length is 256 tokens, but the prompt holds 405" in str(reply)
    cut = post(ranker, "/v1/rerank", query=QUERY, documents=["the cat " * 200], truncate_prompt_tokens=-1)
    assert cut["usage"]["total_tokens"] == 256
    short = post(ranker, "/v2/rerank", query=QUERY, documents=["the cat " * 200], max_tokens_per_doc=10)
    assert short["usage"]["total_tokens"] == 2 + 10 + 3


def test_cohere_embeds(minilm: str) -> None:
    client = cohere.ClientV2("key", base_url=minilm)
    kinds = ["float", "binary", "ubinary", "base64"]
    found = client.embed(model="m", texts=DOCUMENTS, input_type="search_document", embedding_types=kinds)
    wanted = [each["embedding"] for each in post(minilm, "/v1/embeddings", input=DOCUMENTS)["data"]]
    assert found.embeddings.float_ is not None and found.texts == DOCUMENTS
    np.testing.assert_array_equal(np.array(found.embeddings.float_), np.array(wanted))
    bits = np.packbits(np.array(wanted) >= 0, axis=1)
    assert found.embeddings.ubinary == bits.tolist()
    assert found.embeddings.binary == (bits.astype(int) - 128).tolist()
    raw = post(minilm, "/v2/embed", texts=DOCUMENTS, embedding_types=["base64"])
    assert list(raw["embeddings"]) == ["base64"]
    first = np.frombuffer(base64.b64decode(raw["embeddings"]["base64"][0]), "<f4")
    np.testing.assert_array_equal(first, np.array(wanted[0], np.float32))
    assert raw["meta"]["billed_units"]["input_tokens"] > len(DOCUMENTS)
    parts = [{"content": [{"type": "text", "text": text}]} for text in DOCUMENTS]
    assert post(minilm, "/v2/embed", inputs=parts)["embeddings"]["float"] == wanted


def test_cohere_cuts_what_is_long(minilm: str) -> None:
    long = "the cat sat on the mat " * 300
    ends = {side: post(minilm, "/v2/embed", texts=[long + "end"], truncate=side) for side in ("START", "END")}
    assert ends["START"]["embeddings"] != ends["END"]["embeddings"]
    assert post(minilm, "/v2/embed", texts=[long], max_tokens=9)["meta"]["billed_units"]["input_tokens"] == 9
    for body, param in (
        ({"texts": [long], "truncate": "NONE"}, None),
        ({"texts": ["the cat sat"], "truncate": "NONE", "max_tokens": 2}, "max_tokens"),
        ({"texts": []}, "texts"),
        ({"texts": ["a"], "inputs": [{"content": []}]}, "texts"),
        ({"inputs": [{"content": [{"type": "image_url"}]}]}, "inputs"),
        ({"images": ["data:"]}, "images"),
    ):
        reply = httpx.post(f"{minilm}/v2/embed", json=body)
        assert reply.status_code == 400 and (param is None or reply.json()["error"]["param"] == param), body


def test_embedding_models_compare_by_cosine_with_their_prompts(tmp_path: Path) -> None:
    model = write_model(tmp_path, "qwen3")
    write_sentence_files(tmp_path, "lasttoken")
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "is a ", "document": ""}}')
    tokenizer = load_tokenizer(str(tmp_path), {})
    with served(tmp_path) as (url, _, _):
        ranked = post(url, "/v1/rerank", query=QUERY, documents=DOCUMENTS)["results"]
        cut = post(url, "/v1/embeddings", input=QUERY, prompt_name="query", dimensions=16)["data"][0]["embedding"]
        assert post(url, "/v1/embeddings", input=QUERY, dimensions=65)[0] == 400
        asked = post(url, "/v2/embed", texts=[QUERY], input_type="search_query", output_dimension=16)
        assert asked["embeddings"]["float"] == [cut]
    vectors = [hidden_states(model, tokenizer.encode(text))[-1].numpy() for text in ["is a " + QUERY, *DOCUMENTS]]
    unit = [vector / np.linalg.norm(vector) for vector in vectors]
    expected = [float(unit[0] @ each) for each in unit[1:]]
    np.testing.assert_allclose([each["relevance_score"] for each in ranked], sorted(expected, reverse=True), atol=1e-3)
    np.testing.assert_allclose(cut, vectors[0][:16] / np.linalg.norm(vectors[0][:16]), atol=1e-3)


def test_a_chat_model_named_reranker_judges(tmp_path: Path) -> None:
    path = tmp_path / "tiny-Reranker"
    model = write_model(path, "qwen3", transformers.AutoModelForCausalLM)
    with served(path) as (url, _, _):
        found = post(url, "/v1/score", text_1=QUERY, text_2=DOCUMENTS[0], instruction="the pagoda")["data"][0]["score"]
        written = "".join(judged(QUERY, DOCUMENTS[0], "the pagoda"))
        again = post(url, "/v1/score", text_1=written, text_2="")["data"][0]["score"]
    ids = load_tokenizer(str(path), {}).encode(written, add_special_tokens=False)
    logits = model(torch.tensor([ids])).logits[0, -1]
    assert abs(found - (logits[5] - logits[4]).sigmoid().item()) < 1e-3 and abs(again - found) < 1e-6


def test_a_killed_engine_answers_all_the_same(minilm_path: Path) -> None:
    texts = [f"sentence number {i} " * 20 for i in range(120)]
    with served(minilm_path) as (url, _, engine), ThreadPoolExecutor(1) as pool:
        whole = post(url, "/v1/embeddings", input=texts)["data"]
        asked = pool.submit(post, url, "/v1/embeddings", input=texts)
        while not 0 < engine.stats.scheduler.waiting < 100:
            assert not asked.done()
            time.sleep(0.002)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        assert asked.result()["data"] == whole
        assert engine.restarts == 1


@pytest.mark.alone
def test_who_leaves_frees_the_engine(minilm_path: Path) -> None:
    texts = ["far too many words " * 50] * 500
    with served(minilm_path) as (url, server, engine):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + "/v1/embeddings", json={"input": texts}, timeout=0.3)
        limit = time.monotonic() + 120
        while server.busy or engine.stats.scheduler.running + engine.stats.scheduler.waiting:
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert engine.stats.scheduler.prompt_tokens < 500 * 200
