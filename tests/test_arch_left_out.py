"""What published configs and files leave out, or say as no other does."""

from __future__ import annotations

import pytest
import transformers
from family_cases import CASES, SMALL
from later_families import YARN
from seeing_models import MODELS, OTHERS
from test_arch_specs import GGUF, Source, tensor

from pagoda.arch.models import idefics3, llama
from pagoda.arch.names.visual import language_tensors
from pagoda.arch.registry import load_spec


def test_what_gemma_4_12b_has_for_pictures_is_left_out() -> None:
    names = ("model.vision_embedder.patch_ln1.weight", "model.embed_vision.embedding_projection.weight")
    given = {name: tensor(name, (4,)) for name in (*names, "model.language_model.norm.weight")}
    assert set(language_tensors(given)) == {"model.norm.weight"}


@pytest.mark.parametrize("case", ["hy_v3", "helium", "minicpm3", "granite_swa", "granite4-experts"])
def test_what_a_config_leaves_out_is_as_in_transformers(case: str) -> None:
    left_out = ("rms_norm_eps", "rope_parameters", "rope_theta", "num_local_experts")
    said = {name: value for name, value in (SMALL | CASES[case]).items() if name not in left_out}
    kind = said.pop("model_type")
    filled = transformers.AutoConfig.for_model(kind, **said).to_dict()
    assert load_spec(Source(config={**said, "model_type": kind})) == load_spec(Source(config=filled))


def test_glm_4v_leaves_out_the_usual_epsilon() -> None:
    config = (MODELS | OTHERS)["glm4v"]().config.to_dict()
    del config["text_config"]["rms_norm_eps"]
    assert load_spec(Source(config=config)).norm_eps == 1e-5


@pytest.mark.parametrize("case", ["mistral4", "granite_swa"])
def test_a_recipe_of_rope_under_its_old_name(case: str) -> None:
    said = {**SMALL, **CASES[case]}
    recipe = said.pop("rope_parameters", YARN)
    old, new = (load_spec(Source(config={**said, name: recipe})) for name in ("rope_scaling", "rope_parameters"))
    assert old == new


def test_the_gelu_of_gpt_neox_in_gguf() -> None:
    """That of the 20B is the tanh form; Pythia's is exact."""
    table = {name.replace("llama.", "gptneox."): value for name, value in GGUF.items()}
    more = {"general.architecture": "gptneox", "gptneox.attention.layer_norm_epsilon": 1e-5}
    for width, activation in ((6144, "gelu_tanh"), (64, "gelu")):
        metadata = {**table, **more, "gptneox.embedding_length": width}
        spec = load_spec(
            Source(metadata=metadata, tensors={"token_embd.weight": tensor("token_embd.weight", (96, 64))})
        )
        assert spec.layers[0].mlp.activation == activation


def test_smolvlm2_leaves_out_what_is_usual_for_a_llama() -> None:
    """SmolVLM2-2.2B's text_config says no more."""
    said = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "vocab_size": 49280}
    text = {"model_type": "llama", **said, "max_position_embeddings": 8192, "rope_theta": 273768.0}
    theirs = transformers.SmolVLMConfig(text_config=text).text_config.to_dict()
    ours = idefics3.from_config({"model_type": "smolvlm", "text_config": text})
    wanted = llama.from_config(theirs)
    assert (ours.layers, ours.max_position, ours.vocab_size) == (wanted.layers, wanted.max_position, wanted.vocab_size)
