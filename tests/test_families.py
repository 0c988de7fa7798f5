"""The families of decoders that are not quite Llama, in both formats and each executor, against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import VOCAB, with_random_weights
from family_cases import CASES, IN_GGUF, SMALL, tokens_of, write_family, write_family_gguf
from reference_plans import Feed, make_plan
from test_gpt2 import KINDS, KV_ERROR, LAST, LIMITS, TOKENS, check_chunks, expected, load, logits, relative
from test_reference_models import generate

from pagoda.arch.dummy import open_dummy
from pagoda.arch.registry import load_spec
from pagoda.arch.sharding import parallel_sizes
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.torch import ops
from pagoda.deploy.plan.model import planned_model
from pagoda.engine.core import EngineCore
from pagoda.errors import ModelError
from pagoda.options.engine_config import EngineConfig

Folders = dict[str, tuple[Path, Any]]
"""The native executor keeps keys and values in float16."""


ALIKE = ("iquestcoder", "ministral", "cwm", "dots1-window", "jais2", "solar_open", "youtu", "exaone_moe")
"""Cases whose parts other cases have: what these say too is asked on request."""


def unlike(cases: Iterable[str]) -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.slow) if case in ALIKE else case for case in cases]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Each case as safetensors and, where converters know it, as tiny.gguf; and the model it came from."""
    made = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        made[case] = (folder, write_family(folder, case))
        if case in IN_GGUF:
            write_family_gguf(folder / "tiny.gguf", case, made[case][1])
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, kind: str, folders: Folders) -> None:
    folder, model = folders[case]
    executor = load(folder, kind)
    assert relative(logits(executor, LAST), expected(model)) < (KV_ERROR if kind == "cpu" else 1e-4)
    executor.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", IN_GGUF)
def test_gguf_logits_equal_transformers(case: str, kind: str, folders: Folders) -> None:
    folder, model = folders[case]
    executor = load(folder / "tiny.gguf", kind)
    assert relative(logits(executor, LAST), expected(model)) < (KV_ERROR if kind == "cpu" else 1e-4)
    executor.close()


@pytest.mark.parametrize("inner", ["mistral", "ministral3", "mistral4"])
def test_the_language_model_of_mistral_small_behind_its_eyes(inner: str, tmp_path: Path) -> None:
    text = {**SMALL, **CASES.get(inner, {"model_type": inner, "head_dim": 32})}
    sees = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"intermediate_size": 32, "patch_size": 4, "image_size": 16, "head_dim": 16}
    config = transformers.Mistral3Config(text_config=text, vision_config={**sees, **sizes}, image_token_index=9)
    config.tie_word_embeddings = False
    model = with_random_weights(transformers.Mistral3ForConditionalGeneration(config), 3)
    model.save_pretrained(tmp_path)
    for kind in KINDS:
        executor = load(tmp_path, kind)
        assert relative(logits(executor, LAST), expected(model)) < KV_ERROR
        executor.close()


def test_the_language_model_of_exaone_4_5_without_its_eyes(tmp_path: Path) -> None:
    sees = {"depth": 1, "hidden_size": 32, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    text = {**SMALL, **CASES["exaone4"]}
    config = transformers.Exaone4_5_Config(text_config=text, vision_config={**sees, "out_hidden_size": 64})
    model = with_random_weights(transformers.Exaone4_5_ForConditionalGeneration(config), 3)
    model.save_pretrained(tmp_path)
    for kind in KINDS:
        executor = load(tmp_path, kind)
        assert relative(logits(executor, LAST), expected(model)) < KV_ERROR
        executor.close()


@pytest.mark.parametrize("case", unlike(IN_GGUF))
def test_quantized_gguf_models_run_in_their_own_bits(case: str, folders: Folders, tmp_path: Path) -> None:
    write_family_gguf(tmp_path / "tiny.gguf", case, folders[case][1], "Q8_0")
    exact, native = load(tmp_path / "tiny.gguf", "reference"), load(tmp_path / "tiny.gguf", "cpu")
    assert native.capacity.weight_bytes < exact.capacity.weight_bytes / 2
    assert relative(logits(native, LAST), logits(exact, LAST)) < 0.08
    native.close()


@pytest.mark.parametrize("kind", ["cpu", "torch"])
@pytest.mark.parametrize("case", unlike(CASES))
def test_a_prompt_in_chunks_and_in_company_has_the_bits_of_the_whole(case: str, kind: str, folders: Folders) -> None:
    executor = load(folders[case][0], kind, quantization="int8")
    check_chunks(executor, 23)
    executor.close()


@pytest.mark.parametrize("case", ["phi3", "phi", "cohere2"])
def test_greedy_text_equals_transformers(case: str, folders: Folders) -> None:
    folder, model = folders[case]
    core = EngineCore(EngineConfig(model=str(folder), device="cpu", num_blocks=32))
    assert generate(core, TOKENS[:20], 12) == tokens_of(model, TOKENS[:20], 12)


@pytest.mark.parametrize("case", ["phi", "cohere2", "olmo2", "ministral3", "hunyuan"])
def test_through_the_triton_kernels(case: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([Feed([3, 4, 5, 6, 7], 0, [1, 2], rows=[(4, -1, -1)])], VOCAB)
    plain = logits(load(folders[case][0], "torch"), plan)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    assert relative(logits(load(folders[case][0], "torch"), plan), plain) < 2e-3


@pytest.mark.parametrize("case", unlike(CASES))
def test_random_weights_and_the_plan_of_a_config(case: str, folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders[case][0] / "config.json").read_bytes())
    source = open_dummy(str(tmp_path))
    executor = CpuExecutor.load(load_spec(source), source, LIMITS)
    assert executor.launch(LAST).wait().ok.all()
    executor.close()
    stored = {slot: tensor.shape for slot, tensor in planned_model(folders[case][0]).tensors.items()}
    assert stored == {slot: tensor.shape for slot, tensor in planned_model(tmp_path).tensors.items()}


def test_models_that_cannot_be_cut_into_ranks_say_so(folders: Folders) -> None:
    sizes = {case: parallel_sizes(planned_model(folders[case][0]).spec, 2) for case in CASES}
    assert {case for case, works in sizes.items() if works == [1]} == {
        "olmo2",
        "olmo3",
        "olmoe",
        "minimax_m2",
        "granite4-hybrid",
    }


@pytest.mark.parametrize("case", ["glm4"])
def test_two_ranks_give_the_tokens_of_one(case: str, folders: Folders) -> None:
    told = []
    for size in (1, 2):
        table = {"num_blocks": 32, "tensor_parallel_size": size}
        core = EngineCore(EngineConfig(model=str(folders[case][0]), device="torch-cpu", **table))
        told.append(generate(core, TOKENS[:20], 8))
    assert told[0] == told[1]


def test_the_served_context_chooses_the_divisors_of_long_rope(folders: Folders) -> None:
    """Contexts up to the original length have the short ones, also behind a long one."""
    folder, model = folders["phi3-long"]
    few = TOKENS[:30]
    plan = make_plan([Feed(few, 0, [0, 1], rows=[(29, -1, -1)])], VOCAB)
    with torch.no_grad():
        short = model(torch.tensor([few])).logits[0, -1:].numpy()
    for kind in KINDS:
        near, far = load(folder, kind, max_model_len=48), load(folder, kind, max_model_len=49)
        assert relative(logits(near, plan), short) < KV_ERROR
        assert relative(logits(far, plan), short) > 0.05
        near.close()
        far.close()


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        (
            "phi3-long",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "list of 8",
        ),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is true"),
        ("phi", {"hidden_act": "relu"}, "'relu'"),
        ("cohere", {"use_qk_norm": True}, r"Command R\+"),
        ("stablelm", {"qk_layernorm": True}, "StableLM 2 12B"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "0 or 1 for each layer"),
        ("cohere2", {"layer_types": ["full_attention"]}, "for each layer"),
        ("granite4", {"layer_types": ["mamba", "delta"]}, "mamba or attention for each layer"),
        ("granite4-hybrid", {"layer_types": ["mamba"] * 3}, "has no attention"),
        ("granite4-hybrid", {"mamba_proj_bias": True}, "mamba_proj_bias is true"),
        ("granite4-hybrid", {"mamba_n_groups": 3}, "among 3 groups"),
        ("granite4-hybrid", {"mamba_d_head": 48}, "mamba_d_head is 48"),
        ("nemotron_h", {"layers_block_type": ["mlp", "mamba", "attention"]}, "follow a mixer"),
        ("nemotron_h-experts", {"moe_latent_size": 32}, "moe_latent_size is 32"),
        ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "MX*"}, "must hold mamba, attention"),
        ("granite4-hybrid", {"time_step_limit": [0.001, 8.0]}, "time_step_limit is"),
    ],
)
def test_what_is_not_supported_is_named(
    case: str, changes: dict[str, Any], said: str, folders: Folders, tmp_path: Path
) -> None:
    config = json.loads((folders[case][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=said):
        planned_model(tmp_path)
