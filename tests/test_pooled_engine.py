"""Embedding and scoring models in the engine, both executors, against transformers; and what must not change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from checkpoints import make_model, write_gguf_checkpoint
from pooled_models import hidden_states, minilm_folder, write_model, write_sentence_files

from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.encoder import Encoder
from pagoda.deploy.check.check import check_model
from pagoda.deploy.findings import problems
from pagoda.deploy.plan.machines import Machine
from pagoda.deploy.plan.model import planned_model
from pagoda.deploy.plan.plan import make_plan
from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Float32, Request, SamplingParams

LENGTHS = (1, 2, 17, 64, 65, 200)
RNG = np.random.default_rng(3)
TEXTS = [RNG.integers(6, 100, n).tolist() for n in LENGTHS]
DEVICES = ("cpu", "reference", "torch-cpu")
NEAR = 0.9999


def run(core: EngineCore, texts: list[list[int]], second_text: int | None = None) -> list[Float32]:
    """What the engine gives for each text, all of them sent at once."""
    for i, text in enumerate(texts):
        params = SamplingParams(seed=0)
        core.add(Request(request_id=str(i), prompt_token_ids=text, params=params, second_text=second_text))
    found: dict[str, Float32] = {}
    while core.has_work:
        for delta in core.step():
            assert delta.error is None and delta.finish_reason == "stop" and not delta.token_ids
            found[delta.request_id] = np.frombuffer(delta.pooled or b"", np.float32)
    return [found[str(i)] for i in range(len(texts))]


def vectors(path: Path, device: str = "cpu", texts: list[list[int]] = TEXTS, **config: Any) -> list[Float32]:
    core = EngineCore(EngineConfig(model=str(path), device=device, **config))
    try:
        return run(core, texts)
    finally:
        core.close()


def cosine(a: Float32, b: Any) -> float:
    b = np.asarray(b, np.float32)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def check(found: list[Float32], expected: list[Any], atol: float = 2e-3) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert cosine(got, wanted) > NEAR
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_encoders_equal_transformers(kind: str, pooling: str, device: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, kind)
    write_sentence_files(tmp_path, pooling)
    states = [hidden_states(model, text) for text in TEXTS]
    check(vectors(tmp_path, device), [s[0] if pooling == "cls_token" else s.mean(dim=0) for s in states])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pooling", ["lasttoken", "mean_tokens"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_decoders_equal_transformers(kind: str, pooling: str, device: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, kind)
    write_sentence_files(tmp_path, pooling)
    states = [hidden_states(model, text) for text in TEXTS]
    check(vectors(tmp_path, device), [s[-1] if pooling == "lasttoken" else s.mean(dim=0) for s in states])


def test_a_chat_model_is_made_to_embed_when_it_is_told_to(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama", transformers.AutoModelForCausalLM)
    assert EngineCore(EngineConfig(model=str(tmp_path))).info.task == "generate"
    check(vectors(tmp_path, task="embed"), [hidden_states(model.model, text)[-1] for text in TEXTS])


def test_a_gguf_that_names_its_pooling_embeds(tmp_path: Path) -> None:
    model = make_model("qwen3")
    write_gguf_checkpoint(tmp_path / "tiny.gguf", model, metadata={"qwen3.pooling_type": 3})
    check(vectors(tmp_path / "tiny.gguf"), [hidden_states(model.model, text)[-1] for text in TEXTS])


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_that_keeps_only_the_rows_of_its_answers_scores(tied: bool, tmp_path: Path) -> None:
    """As the converter writes Qwen3-Reranker: the head is gone but for its rows of yes and no."""
    model = make_model("qwen3", tie_word_embeddings=tied)
    rows = model.lm_head.weight.detach()[[5, 4]].clone()
    labels = {"qwen3.pooling_type": 4, "qwen3.classifier.output_labels": ["yes", "no"]}
    write_gguf_checkpoint(tmp_path / "tiny.gguf", model, metadata=labels, more={"cls.output.weight": rows.numpy()})
    assert EngineCore(EngineConfig(model=str(tmp_path / "tiny.gguf"))).info.task == "score"
    found = np.concatenate(vectors(tmp_path / "tiny.gguf", "reference"))
    expected = [hidden_states(model.model, text)[-1] @ (rows[0] - rows[1]) for text in TEXTS]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_cross_encoders_equal_transformers(kind: str, device: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, kind, transformers.AutoModelForSequenceClassification, num_labels=1)
    core = EngineCore(EngineConfig(model=str(tmp_path), device=device))
    assert (core.info.task, core.info.width) == ("score", 1)
    texts = [text for text in TEXTS if len(text) > 10]
    found = run(core, texts, second_text=7)
    types = [[int(place >= 7 and kind == "bert") for place in range(len(text))] for text in texts]
    with torch.no_grad():
        expected = [
            model(torch.tensor([text]), token_type_ids=torch.tensor([kinds])).logits[0].numpy()
            for text, kinds in zip(texts, types, strict=True)
        ]
    np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=1e-3, atol=1e-3)


def test_a_decoder_with_a_classifier_scores_by_its_last_token(tmp_path: Path) -> None:
    auto = transformers.AutoModelForSequenceClassification
    model = write_model(tmp_path, "qwen3", auto, num_labels=1, pad_token_id=0)
    with torch.no_grad():
        expected = [model(torch.tensor([text])).logits[0].numpy() for text in TEXTS]
    np.testing.assert_allclose(np.stack(vectors(tmp_path)), np.stack(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_chat_model_scores_by_yes_over_no(tied: bool, tmp_path: Path) -> None:
    model = write_model(tmp_path, "qwen3", transformers.AutoModelForCausalLM, tie_word_embeddings=tied)
    with torch.no_grad():
        logits = [model(torch.tensor([text])).logits[0, -1].numpy() for text in TEXTS]
    found = np.concatenate(vectors(tmp_path, task="score"))
    np.testing.assert_allclose(found, [row[5] - row[4] for row in logits], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "pooling"), [("bert", "mean_tokens"), ("qwen3", "mean_tokens"), ("qwen3", "lasttoken")]
)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_bits_do_not_depend_on_company_chunks_or_cache(
    kind: str, pooling: str, quantization: str | None, tmp_path: Path
) -> None:
    write_model(tmp_path, kind)
    write_sentence_files(tmp_path, pooling)
    shape = {"max_num_batched_tokens": 48, "max_num_seqs": 3, "quantization": quantization}
    alone = [vectors(tmp_path, texts=[text], quantization=quantization, threads=1)[0] for text in TEXTS]
    core = EngineCore(EngineConfig(model=str(tmp_path), threads=2, **shape))
    for turn in range(2):  # the second one finds the prefixes of the first, where there is a cache
        for got, wanted in zip(run(core, TEXTS), alone, strict=True):
            assert np.array_equal(got, wanted), turn


def test_minilm_in_pytorch_equals_sentence_transformers() -> None:
    texts = ["A pagoda is a tower.", "Ünïcödé, 数字 and 🙂", "so long " * 100, "?"]
    encoder = sentence_transformers.SentenceTransformer(str(minilm_folder()), device="cpu")
    ids = [encoder.tokenizer(text)["input_ids"] for text in texts]
    found = np.array(vectors(minilm_folder(), "torch-cpu", ids))  # before they are made of length 1
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-5)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_bits_of_an_encoder_in_pytorch_do_not_depend_on_company(quantization: str | None, tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    alone = [vectors(tmp_path, "torch-cpu", [text], quantization=quantization)[0] for text in TEXTS]
    for got, wanted in zip(vectors(tmp_path, "torch-cpu", quantization=quantization), alone, strict=True):
        assert np.array_equal(got, wanted)


def test_an_encoder_in_pytorch_that_is_short_of_memory_cuts_between_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, "bert")
    expected = vectors(tmp_path, "torch-cpu")
    whole, sizes = Encoder.hidden, []

    def short(self: Encoder, batch: Batch) -> torch.Tensor:
        sizes.append(len(batch.tokens))
        if len(batch.starts) > 2:
            raise torch.OutOfMemoryError
        return whole(self, batch)

    monkeypatch.setattr(Encoder, "hidden", short)
    for got, wanted in zip(vectors(tmp_path, "torch-cpu"), expected, strict=True):
        assert np.array_equal(got, wanted)
    assert set(LENGTHS) < set(sizes)


def test_an_encoder_is_on_one_gpu(tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    with pytest.raises(ConfigError, match=r"an encoder is computed on one GPU. Leave it out"):
        EngineCore(EngineConfig(model=str(tmp_path), device="torch-cpu", tensor_parallel_size=2))


def test_encoders_pack_short_requests_and_run_long_ones_alone(tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    core = EngineCore(EngineConfig(model=str(tmp_path), max_num_batched_tokens=64))
    run(core, [[7] * 20] * 3 + [[7] * 200] + [[7] * 20])
    assert core.stats().steps == 3
    assert core.stats().scheduler.prompt_tokens == 280
    core.add(Request(request_id="long", prompt_token_ids=[7] * 257, params=SamplingParams(seed=0)))
    assert "257 tokens, the engine takes 1 to 256" in (core.step()[0].error or "")


def test_the_longest_input_is_the_one_it_was_trained_for(tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    write_sentence_files(tmp_path, "mean_tokens", max_seq_length=100)
    assert EngineCore(EngineConfig(model=str(tmp_path))).info.max_model_len == 100
    assert EngineCore(EngineConfig(model=str(tmp_path), max_model_len=200)).info.max_model_len == 200
    with pytest.raises(ConfigError, match="above 256"):
        EngineCore(EngineConfig(model=str(tmp_path), max_model_len=300))


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    with pytest.raises(ModelError, match="generate no text"):
        EngineCore(EngineConfig(model=str(tmp_path), task="generate"))
    with pytest.raises(ModelError, match="no head that gives scores"):
        EngineCore(EngineConfig(model=str(tmp_path), task="score"))
    write_sentence_files(tmp_path, "max_tokens")
    with pytest.raises(ModelError, match="pooling by max_tokens is not supported"):
        EngineCore(EngineConfig(model=str(tmp_path)))
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.LSTM", "path": "2_LSTM"}]')
    with pytest.raises(ModelError, match="the step LSTM behind the model is not supported"):
        EngineCore(EngineConfig(model=str(tmp_path)))


def test_check_and_plan_know_such_models(tmp_path: Path) -> None:
    write_model(tmp_path, "xlm-roberta", transformers.AutoModelForSequenceClassification, num_labels=1)
    findings = check_model(str(tmp_path), {})
    assert not problems(findings)
    assert any("xlm_roberta, 2 layers, context 256, gives scores" in each.text for each in findings)
    config = EngineConfig(model=str(tmp_path))
    made = make_plan(planned_model(tmp_path), config, Machine("this CPU", 1 << 30))
    core = EngineCore(config)
    assert made.fits and made.kv_bytes == core.info.kv_bytes == 0 and made.context == 256
    assert made.activation_bytes == pytest.approx(core.info.activation_bytes, rel=0.02)
    assert made.weight_bytes == pytest.approx(core.info.weight_bytes, rel=0.1)
