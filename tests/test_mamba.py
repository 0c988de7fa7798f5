"""State spaces (Mamba-2): the states of requests, kept, moved and shared among ranks; sizes of published models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_hybrid
import test_hybrid_prefix
from family_cases import tokens_of, write_family
from test_hybrid import DEVICES, TOKENS, core, load
from test_reference_models import generate

from pagoda.arch import memory
from pagoda.arch.lora import check_adapters
from pagoda.arch.mamba import Mamba
from pagoda.arch.registry import load_spec
from pagoda.deploy.plan.model import model_of_config
from pagoda.errors import ConfigError, ModelError
from pagoda.weights.open import open_source

Tiny = tuple[Path, Any]
GRANITE_4_TINY = {
    "model_type": "granitemoehybrid",
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12,
    "hidden_size": 1536,
    "intermediate_size": 512,
    "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
    "logits_scaling": 6,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 48,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "num_attention_heads": 12,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 40,
    "num_key_value_heads": 4,
    "num_local_experts": 64,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "shared_intermediate_size": 1024,
    "tie_word_embeddings": True,
    "vocab_size": 100352,
}
NEMOTRON_3_NANO = {
    "model_type": "nemotron_h",
    "conv_kernel": 4,
    "head_dim": 128,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_num_heads": 64,
    "max_position_embeddings": 262144,
    "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_groups": 8,
    "n_routed_experts": 128,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "routed_scaling_factor": 2.5,
    "ssm_state_size": 128,
    "time_step_limit": [0.0, float("inf")],
    "vocab_size": 131072,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    path = tmp_path_factory.mktemp("mamba")
    return path, write_family(path, "granite4-hybrid", max_position_embeddings=1024)


@pytest.mark.parametrize("device", DEVICES)
def test_company_and_what_a_slot_held_before_change_no_bit(device: str, tiny: Tiny) -> None:
    test_hybrid.check_company(tiny[0], device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_kept_state_has_the_bits_of_the_request(device: str, tiny: Tiny) -> None:
    test_hybrid_prefix.test_a_kept_state_has_the_bits_of_the_request(device, tiny[0])


def test_a_chat_begins_behind_what_is_known(tiny: Tiny) -> None:
    test_hybrid_prefix.test_a_chat_of_three_turns("cpu", tiny[0])


def test_preemption_and_a_restart_change_no_token(tiny: Tiny) -> None:
    test_hybrid.test_preemption_and_a_restart_change_no_token("cpu", tiny)


@pytest.mark.slow
def test_the_kernels_and_the_fixed_buffers_of_graphs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    test_hybrid.check_kernels(tiny[0], monkeypatch)


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
def test_greedy_text_equals_transformers(device: str, tiny: Tiny) -> None:
    assert generate(core(tiny[0], device), TOKENS[:20], 12) == tokens_of(tiny[1], TOKENS[:20], 12)


@pytest.mark.parametrize("case", ["granite4-experts", pytest.param("nemotron_h-experts", marks=pytest.mark.slow)])
def test_two_ranks_share_the_groups(case: str, tmp_path: Path) -> None:
    write_family(tmp_path, case)
    test_hybrid.check_two_ranks(tmp_path)


def test_the_state_is_a_part_of_the_memory(tiny: Tiny) -> None:
    spec = load_spec(open_source(str(tiny[0])))
    assert memory.state_bytes(spec) == 2 * 4 * (3 * (128 + 2 * 16) + 8 * 16 * 16)
    executor = load(tiny[0], "reference")
    assert executor.capacity.kv_bytes == 4 * memory.state_bytes(spec) + 32 * memory.kv_bytes_per_block(spec, "float32")


def test_the_sizes_of_a_published_model() -> None:
    model = model_of_config(GRANITE_4_TINY, ())
    assert model.parameters == pytest.approx(6.94e9, rel=0.01)
    assert [i for i, layer in enumerate(model.spec.layers) if layer.delta is None] == [5, 15, 25, 35]
    assert model.spec.layers[0].delta == Mamba(1, 48, 128, 64, 4, 1e-5)
    assert not model.spec.layers[5].attention.rope


def test_the_sizes_of_nemotron_3_nano() -> None:
    model = model_of_config(NEMOTRON_3_NANO, ())
    assert model.parameters == pytest.approx(31.6e9, rel=0.01)
    layers = model.spec.layers
    assert len(layers) == 29 and sum(layer.delta is None for layer in layers) == 6
    assert sum(not layer.mlp.size for layer in layers) == 6 and not any(layer.attention.rope for layer in layers)
    assert layers[0].delta == Mamba(8, 64, 128, 64, 4, 1e-5)


def test_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match="state spaces are not read"):
        check_adapters(model_of_config(GRANITE_4_TINY, ()).spec)


@pytest.mark.parametrize(
    ("limits", "fine"),
    [
        ([0.0, float("inf")], True),
        ([{"__float__": "0.0"}, {"__float__": "Infinity"}], False),
        ([0.0, {"__float__": "Infinity"}], True),
        ([0.0, 8.0], False),
    ],
)
def test_limits_of_steps_are_none_or_refused(limits: list[Any], fine: bool) -> None:
    config = {**GRANITE_4_TINY, "time_step_limit": limits}
    if fine:
        assert model_of_config(config, ()).spec.recurrent
    else:
        with pytest.raises(ModelError, match="time_step_limit is"):
            model_of_config(config, ())
