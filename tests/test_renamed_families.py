"""Families that transformers lacks, under their own names in both formats and each executor, against their like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from renamed_cases import CASES, write_renamed
from test_gpt2 import KINDS, LAST, expected, load, logits, relative

from pagoda.arch.models import minicpm
from pagoda.arch.registry import load_spec
from pagoda.deploy.plan.model import planned_model
from pagoda.errors import ModelError
from pagoda.weights.open import open_source

KV_ERROR = 5e-3
"""The native executor keeps keys and values in float16."""


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_same_layers_in_transformers(case: str, tmp_path: Path) -> None:
    model = write_renamed(tmp_path, case)
    for kind in KINDS:
        for path in [tmp_path] * CASES[case].published + [tmp_path / "tiny.gguf"]:
            executor = load(path, kind)
            assert relative(logits(executor, LAST), expected(model)) < (KV_ERROR if kind == "cpu" else 1e-4)
            executor.close()


def test_old_files_of_minicpm_have_the_multipliers_of_its_2b(tmp_path: Path) -> None:
    write_renamed(tmp_path, "minicpm")
    source = open_source(str(tmp_path / "tiny.gguf"))
    whole = load_spec(source)
    fewer = {name: value for name, value in source.metadata.items() if not name.endswith("_scale")}
    old = minicpm.from_gguf(fewer, source.tensors)
    assert old.embed_scale == pytest.approx(whole.embed_scale) and old.norm_eps == pytest.approx(whole.norm_eps)
    assert old.logit_scale == pytest.approx(256 / 64)


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("minicpm", {"sparse_config": {"topk": 64}}, "sparse attention"),
        ("minicpm", {"num_experts": 8}, "num_experts is not 0"),
        ("bailing_moe", {"norm_head": True}, "norm_head is true"),
        ("bailing_moe", {"score_function": "tanh"}, "'tanh'; supported: softmax, sigmoid"),
        ("deepseek", {"scoring_func": "sigmoid"}, "supported with softmax only"),
        ("xverse", {"model_type": "baichuan"}, "read from GGUF only"),
    ],
)
def test_what_is_not_supported_is_named(case: str, changes: dict[str, object], said: str, tmp_path: Path) -> None:
    write_renamed(tmp_path, case)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=said):
        planned_model(tmp_path)
