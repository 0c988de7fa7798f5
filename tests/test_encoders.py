"""Encoders of all families, in all executors, against transformers; and what some have behind the pooling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from encoder_gguf import write_encoder
from pooled_models import hidden_states, write_model, write_sentence_files
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer import modules as models
from test_pooled_engine import DEVICES, TEXTS, check, run, vectors

from pagoda.deploy.check.check import check_model
from pagoda.deploy.findings import problems
from pagoda.deploy.plan.machines import Machine
from pagoda.deploy.plan.model import planned_model
from pagoda.deploy.plan.plan import make_plan
from pagoda.engine.core import EngineCore
from pagoda.errors import ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Float32

FAMILIES = (
    *("nomic_bert", "gte", "gte: no types", "jina_embeddings_v3"),
    *("modernbert", "modernbert: biases", "gemma3_text"),
)
IN_GGUF = ("bert", "xlm-roberta", "nomic_bert", "jina_embeddings_v3", "modernbert", "gemma3_text")
CLASSIFIER = transformers.AutoModelForSequenceClassification


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A model, and what transformers makes of the texts."""
    path = tmp_path_factory.mktemp("encoder")
    model = write_model(path, request.param)
    write_sentence_files(path, "mean_tokens")
    return path, [hidden_states(model, text).mean(dim=0) for text in TEXTS]


@pytest.mark.parametrize("device", DEVICES)
def test_equal_transformers(written: tuple[Path, list[Any]], device: str) -> None:
    path, expected = written
    check(vectors(path, device), expected)


def test_bits_do_not_depend_on_company(written: tuple[Path, list[Any]]) -> None:
    path, _ = written
    for device, quantization in (("cpu", None), ("cpu", "int8"), ("torch-cpu", None)):
        together = vectors(path, device, quantization=quantization, threads=2)
        for text, found in zip(TEXTS[3:], together[3:], strict=True):
            assert np.array_equal(vectors(path, device, [text], quantization=quantization, threads=1)[0], found)


@pytest.mark.parametrize(("window", "bfloat16"), [(40, False), (400, False), (40, True)])
def test_windows_over_several_segments_of_keys(window: int, bfloat16: bool, tmp_path: Path) -> None:
    texts = [np.random.default_rng(5).integers(6, 100, count).tolist() for count in (257, 700)]
    model = write_model(tmp_path, "modernbert", max_position_embeddings=1024, local_attention=window)
    write_sentence_files(tmp_path, "mean_tokens")
    if bfloat16:
        model.bfloat16().save_pretrained(tmp_path)
        model.float()
    found = vectors(tmp_path, "cpu", texts)
    check(found, [hidden_states(model, text).mean(dim=0) for text in texts], atol=2e-2 if bfloat16 else 2e-3)
    assert np.array_equal(vectors(tmp_path, "cpu", texts[1:], threads=1)[0], found[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"hidden_act": "silu"}, "no activation 'silu'"), ({"num_attention_heads": 8}, "multiple of 16")],
)
def test_what_the_kernels_lack_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_model(tmp_path, "bert", **changes)
    with pytest.raises(ModelError, match=said):
        EngineCore(EngineConfig(model=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("kind", IN_GGUF)
def test_gguf_equals_transformers(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, kind)
    write_encoder(tmp_path / "m.gguf", tmp_path, pooling_type=1)
    expected = [hidden_states(model, text).mean(dim=0) for text in TEXTS]
    for device in DEVICES:
        check(vectors(tmp_path / "m.gguf", device), expected)


@pytest.mark.parametrize("kind", ["nomic_bert", "gte", "jina_embeddings_v3", "modernbert", "modernbert: biases"])
def test_cross_encoders_equal_transformers(kind: str, tmp_path: Path) -> None:
    expected = scores(write_model(tmp_path, kind, CLASSIFIER, num_labels=1))
    core = EngineCore(EngineConfig(model=str(tmp_path)))
    assert (core.info.task, core.info.width) == ("score", 1)
    np.testing.assert_allclose(run(core, TEXTS), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "pooling"), [("xlm-roberta", "cls"), ("modernbert", "mean")])
def test_cross_encoders_in_gguf(kind: str, pooling: str, tmp_path: Path) -> None:
    changes = {"classifier_pooling": pooling} if kind == "modernbert" else {}
    expected = scores(write_model(tmp_path, kind, CLASSIFIER, num_labels=1, **changes))
    write_encoder(tmp_path / "m.gguf", tmp_path, pooling_type=4)
    core = EngineCore(EngineConfig(model=str(tmp_path / "m.gguf")))
    assert (core.info.task, core.info.width) == ("score", 1)
    np.testing.assert_allclose(run(core, TEXTS), expected, rtol=1e-3, atol=1e-3)


def scores(model: Any) -> list[Float32]:
    with torch.no_grad():
        return [model(torch.tensor([text])).logits[0].numpy() for text in TEXTS]


def test_a_classifier_that_lost_its_first_layer_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "bert", CLASSIFIER, num_labels=1)
    write_encoder(tmp_path / "m.gguf", tmp_path)
    with pytest.raises(ModelError, match="has lost the layer in front of its classifier"):
        EngineCore(EngineConfig(model=str(tmp_path / "m.gguf")))
    assert EngineCore(EngineConfig(model=str(tmp_path / "m.gguf"), task="embed")).info.task == "embed"


def write_dense(path: Path) -> None:
    """Two layers behind the pooling, as EmbeddingGemma has them, the second with all that there can be."""
    steps = [
        models.Transformer(str(path)),
        models.Pooling(64, "mean"),
        models.Dense(64, 96, bias=False, activation_function=torch.nn.Identity()),
        models.Dense(96, 32, bias=True, activation_function=torch.nn.Tanh()),
        models.Normalize(),
    ]
    sentence_transformers.SentenceTransformer(modules=steps, device="cpu").save(str(path))


def test_layers_behind_the_pooling(tmp_path: Path) -> None:
    model = write_model(tmp_path, "gemma3_text")
    write_sentence_files(tmp_path, "mean_tokens")
    write_dense(tmp_path)
    core = EngineCore(EngineConfig(model=str(tmp_path)))
    assert core.info.width == 32
    first, second = (models.Dense.load(str(tmp_path / name)) for name in ("2_Dense", "3_Dense"))
    with torch.no_grad():
        means = [hidden_states(model, text).mean(dim=0) for text in TEXTS]
        expected = [second.activation_function(second.linear(first.linear(mean))) for mean in means]
    check(run(core, TEXTS), expected)
    steps = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps([*steps[:2], steps[4], *steps[2:4]]))
    with pytest.raises(ModelError, match="steps in the order Transformer, Pooling, Normalize, Dense, Dense"):
        EngineCore(EngineConfig(model=str(tmp_path)))


def test_layers_behind_the_pooling_in_gguf(tmp_path: Path) -> None:
    model = write_model(tmp_path, "gemma3_text")
    first, second = torch.randn(96, 64), torch.randn(64, 96)
    for number, weight in (("2", first), ("3", second)):
        (tmp_path / f"{number}_Dense").mkdir()
        save_file({"linear.weight": weight}, tmp_path / f"{number}_Dense" / "model.safetensors")
    write_encoder(tmp_path / "m.gguf", tmp_path, pooling_type=1)
    core = EngineCore(EngineConfig(model=str(tmp_path / "m.gguf")))
    assert core.info.width == 64
    means = [hidden_states(model, text).mean(dim=0) for text in TEXTS]
    check(run(core, TEXTS), [second @ (first @ mean) for mean in means])


@pytest.mark.parametrize("kind", ["modernbert", "gemma3_text"])
def test_check_and_plan_know_such_models(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path, kind)
    findings = check_model(str(tmp_path), {})
    assert not problems(findings)
    assert any("makes embeddings" in each.text for each in findings)
    config = EngineConfig(model=str(tmp_path), task="embed")
    made = make_plan(planned_model(tmp_path), config, Machine("this CPU", 1 << 30))
    info = EngineCore(config).info
    assert made.fits and made.kv_bytes == info.kv_bytes == 0
    assert made.activation_bytes == pytest.approx(info.activation_bytes, rel=0.05)
    assert made.weight_bytes == pytest.approx(info.weight_bytes, rel=0.1)
