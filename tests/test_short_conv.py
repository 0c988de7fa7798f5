"""Short convolutions (LFM2): the states of requests, kept, moved and shared among ranks; sizes of published models."""

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
from pagoda.arch.registry import load_spec
from pagoda.arch.short_conv import ShortConv
from pagoda.deploy.plan.model import model_of_config
from pagoda.errors import ConfigError, ModelError
from pagoda.weights.open import open_source

Tiny = tuple[Path, Any]
LFM2_1B = {
    "model_type": "lfm2",
    "block_auto_adjust_ff_dim": True,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "conv_L_cache": 3,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "tie_embedding": True,
    "vocab_size": 65536,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    path = tmp_path_factory.mktemp("lfm2")
    return path, write_family(path, "lfm2", max_position_embeddings=1024)


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


def test_two_ranks_share_the_channels(tiny: Tiny) -> None:
    test_hybrid.check_two_ranks(tiny[0])


def test_the_state_is_a_part_of_the_memory(tiny: Tiny) -> None:
    spec = load_spec(open_source(str(tiny[0])))
    assert memory.state_bytes(spec) == 3 * 4 * 3 * 64
    executor = load(tiny[0], "reference")
    assert executor.capacity.kv_bytes == 4 * memory.state_bytes(spec) + 32 * memory.kv_bytes_per_block(spec, "float32")


def test_the_sizes_of_a_published_model() -> None:
    model = model_of_config(LFM2_1B, ())
    assert model.parameters == pytest.approx(1.17e9, rel=0.01)
    assert [i for i, layer in enumerate(model.spec.layers) if layer.delta is None] == LFM2_1B["full_attn_idxs"]
    assert model.spec.layers[0].delta == ShortConv(2048, 3) and model.spec.layers[0].mlp.size == 8192
    assert model.spec.tied


def test_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match="models of the type lfm2 are not read"):
        check_adapters(model_of_config(LFM2_1B, ()).spec)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conv_bias": True}, "conv_bias is true"),
        ({"layer_types": ["conv"]}, "conv or full_attention for each layer"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        model_of_config({**LFM2_1B, **changes}, ())
