"""Gemma: what its configurations mean, each executor in company and in chunks, other spellings, chat, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import transformers
from checkpoints import make_model, write_checkpoint, write_gguf_checkpoint
from safetensors.torch import load_file, save_file
from server_process import running, serve
from test_gpt2 import KINDS, LAST, LIMITS, TOKENS, check_chunks, expected, load, logits, relative
from test_reference_models import generate, greedy
from text_models import trained_json

from pagoda.arch.dummy import open_dummy
from pagoda.arch.registry import load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.cpu.library import isas
from pagoda.engine.core import EngineCore
from pagoda.errors import ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.text.chat import ChatTemplate
from pagoda.text.tokenizer import load_tokenizer


class Source:
    """A checkpoint of which only the configuration counts."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.metadata, self.tensors, self.path = config, {}, {}, ""

    def close(self) -> None: ...


def spec_of(**config: Any) -> ModelSpec:
    return load_spec(Source(config))


def test_the_config_of_a_model_that_sees_may_say_little() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    scaling = {"factor": 8.0, "rope_type": "linear"}
    spec = spec_of(
        model_type="gemma3",
        text_config={"model_type": "gemma3_text", "rope_scaling": scaling, **text},
        eos_token_id=[1, 106],
        torch_dtype="bfloat16",
        vision_config={
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    )
    first, sixth = spec.layers[0].attention, spec.layers[5].attention
    assert (spec.vocab_size, spec.max_position, spec.tied, spec.eos_token_ids) == (262208, 131072, True, (1, 106))
    assert (first.heads, first.kv_heads, first.head_dim, first.scale) == (8, 4, 256, 1 / 16)
    assert (first.window, first.local, sixth.window, sixth.local) == (1024, True, None, False)
    assert spec.embed_scale == 50.5  # the root of 2560 is 50.596, in bfloat16 50.5
    assert spec.local_rope is not None
    assert spec.rope.inv_freq[:2] == pytest.approx((1 / 8, 1e6 ** (-2 / 256) / 8))
    assert spec.local_rope.inv_freq[:2] == pytest.approx((1, 1e4 ** (-2 / 256)))
    vision = spec.vision
    assert vision is not None
    assert (vision.side, vision.merge_size, vision.tokens((1, 64, 64)), vision.at_once) == (64, 4, 256, 256)
    assert (vision.image_token_id, vision.ends, vision.head_dim) == (262144, (255999, 256000), 72)


def test_a_window_as_long_as_the_context_is_none_but_the_rope_stays_local() -> None:
    spec = spec_of(**CONFIG, max_position_embeddings=512)
    assert [layer.attention.window for layer in spec.layers] == [None] * 6
    assert [layer.attention.local for layer in spec.layers] == [True] * 5 + [False]


CONFIG = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 512}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'; Gemma has gelu_pytorch_tanh"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is .*for each layer"),
        ({"rope_parameters": {"full_attention": 3}}, "must be tables"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        spec_of(**{**CONFIG, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_prompt_in_chunks_and_in_company_has_the_bits_of_the_whole(
    kind: str, case: str, quantization: str | None, tmp_path: Path
) -> None:
    if quantization and (kind == "reference" or case == "gemma2"):
        pytest.skip("one model is enough for what does not depend on the weights, and the reference has none")
    write_checkpoint(tmp_path, case)
    executor = load(tmp_path, kind, quantization=quantization)
    check_chunks(executor, 13)
    executor.close()


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
def test_greedy_text_equals_transformers_the_second_time_too(device: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "gemma3")
    core = EngineCore(EngineConfig(model=str(tmp_path), device=device, num_blocks=32, max_model_len=256))
    wanted = greedy(model, TOKENS, 12)
    core.close, close = (lambda: None), core.close  # type: ignore[method-assign]
    assert generate(core, TOKENS, 12) == wanted
    assert generate(core, TOKENS, 12) == wanted  # its prefix is in the cache now
    close()


@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set_has_the_caps(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "gemma2")
    monkeypatch.setenv("PAGODA_CPU_ISA", isa)
    native, exact = load(tmp_path, "cpu"), load(tmp_path, "reference")
    values = logits(native, LAST)
    assert relative(values, logits(exact, LAST)) < 2e-3
    assert 4 < np.abs(values).max() <= 5  # capped there
    native.close()


@pytest.mark.parametrize("case", ["gemma", "gemma2", "gemma3"])
def test_quantized_gguf_models_stay_near(case: str, tmp_path: Path) -> None:
    write_gguf_checkpoint(tmp_path / "tiny.gguf", make_model(case), "Q8_0")
    native, exact = load(tmp_path / "tiny.gguf", "cpu"), load(tmp_path / "tiny.gguf", "reference")
    assert relative(logits(native, LAST), logits(exact, LAST)) < 0.05
    on_device = load(tmp_path / "tiny.gguf", "torch")
    assert relative(logits(on_device, LAST), logits(exact, LAST)) < 1e-3
    for executor in (native, on_device, exact):
        executor.close()


def write_seeing(folder: Path, **changes: Any) -> Any:
    """A model that sees, with the language model that is returned."""
    plain = make_model("gemma3", **changes)
    seeing = transformers.Gemma3Config(
        text_config=plain.config.to_dict(),
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        image_token_index=7,
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(seeing).float().eval()
    model.model.language_model.load_state_dict(plain.model.state_dict())
    model.save_pretrained(folder)
    return plain


@pytest.mark.parametrize("new", [False, True])
def test_the_language_model_of_one_that_sees(new: bool, tmp_path: Path) -> None:
    plain = write_seeing(tmp_path)
    if new:  # as newer versions of transformers spell it
        file = tmp_path / "model.safetensors"
        old = {re.sub(r"^language_model\.model", "model.language_model", n): t for n, t in load_file(file).items()}
        save_file({n if n.startswith("model.") else f"model.{n}": t for n, t in old.items()}, file)
    executor = load(tmp_path, "cpu")
    assert relative(logits(executor, LAST), expected(plain)) < 2e-3
    executor.close()


def test_random_weights_of_a_config_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gemma3")
    (tmp_path / "model.safetensors").unlink()
    source = open_dummy(str(tmp_path))
    executor = CpuExecutor.load(load_spec(source), source, LIMITS)
    assert executor.launch(LAST).wait().ok.all()
    executor.close()


TEMPLATE = """{{ bos_token }}
{%- set lead = "" %}{% set rest = messages %}
{%- if messages[0]["role"] == "system" %}
  {%- set lead = (messages[0]["content"] if messages[0]["content"] is string else messages[0]["content"][0]["text"]) %}
  {%- set lead = lead + "\\n\\n" %}{% set rest = messages[1:] %}
{%- endif %}
{%- for message in rest %}
  {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("wrong order") }}{% endif %}
  {%- set role = "model" if message["role"] == "assistant" else message["role"] %}
  {{- "<start_of_turn>" + role + "\\n" + (lead if loop.first else "") }}
  {%- if message["content"] is string %}{{ message["content"] | trim }}
  {%- elif message["content"] is iterable %}
    {%- for item in message["content"] %}{{ item["text"] | trim if item["type"] == "text" else "" }}{% endfor %}
  {%- endif %}{{ "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}"""


def test_a_template_of_its_constructs() -> None:
    template = ChatTemplate(TEMPLATE, special_tokens={"bos_token": "<bos>"})
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": " Hi "}]
    said = template.render(talk, add_generation_prompt=True)
    assert said == "<bos><start_of_turn>user\nBe short.\n\nHi<end_of_turn>\n<start_of_turn>model\n"


def test_a_server_answers_and_refuses_a_broken_picture(tmp_path: Path) -> None:
    size = len(json.loads(trained_json())["model"]["vocab"]) + 2
    model = write_seeing(tmp_path, vocab_size=size)
    (tmp_path / "tokenizer.json").write_text(trained_json(), encoding="utf-8")
    table = {"chat_template": TEMPLATE, "bos_token": "<|endoftext|>", "tokenizer_class": "GemmaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    tokenizer = load_tokenizer(str(tmp_path), {})
    prompt = tokenizer.encode("<|endoftext|><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    command = serve(str(tmp_path), "--device", "cpu", "--num-gpu-blocks-override", "32")
    with running(*command) as url, httpx.Client(base_url=url, timeout=120) as client:

        def chat(content: Any) -> httpx.Response:
            talk = [{"role": "user", "content": content}]
            name = client.get("/v1/models").json()["data"][0]["id"]
            return client.post(
                "/v1/chat/completions",
                json={"model": name, "messages": talk, "max_tokens": 8, "temperature": 0, "logprobs": True},
            )

        answer, refused = chat("Hi").json(), chat([picture])
    said = [each["token"] for each in answer["choices"][0]["logprobs"]["content"]]
    assert "".join(said) == tokenizer.decode(greedy(model, prompt, len(said)))
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert refused.status_code == 400
    assert "picture" in refused.text or "image" in refused.text
