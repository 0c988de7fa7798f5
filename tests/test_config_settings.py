"""Options from four sources: precedence, spellings, numbers, and errors that say what to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagoda.cli.help import page, serve_help
from pagoda.errors import ConfigError
from pagoda.options.check import check
from pagoda.options.config import Options, declared
from pagoda.options.flags import not_yet, without_effect
from pagoda.options.resolve import Catalog, Settings, each_model, resolve


def options(line: str = "", environ: dict[str, str] | None = None, file: dict[str, Any] | None = None) -> Settings:
    return resolve(line.split(), environ or {}, None if file is None else ("file", file))


@pytest.mark.parametrize(
    ("line", "environ", "file", "port", "origin"),
    [
        ("", {}, {}, 8000, "default"),
        ("", {}, {"port": 1}, 1, "file"),
        ("", {"PAGODA_PORT": "2"}, {"port": 1}, 2, "environment PAGODA_PORT"),
        ("--port 3", {"PAGODA_PORT": "2"}, {"port": 1}, 3, "command line"),
        ("--port 3", {}, {"port": 1}, 3, "command line"),
        ("--port 3", {"PAGODA_PORT": "2"}, None, 3, "command line"),
        ("", {"PAGODA_PORT": " "}, {"port": 1}, 1, "file"),
        ("", {}, {"port": None}, 8000, "default"),
    ],
)
def test_precedence(line: str, environ: dict[str, str], file: dict[str, Any] | None, port: int, origin: str) -> None:
    settings = options(line, environ, file)
    assert settings.options.port == port
    assert settings.origins["port"] == origin


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--max-model-len 1k", "max_model_len", 1000),
        ("--max_model_len=25.6k", "max_model_len", 25_600),
        ("--max-model-len 1K", "max_model_len", 1024),
        ("--max-model-len auto", "max_model_len", None),
        ("--max-model-len -1", "max_model_len", None),
        ("--kv-cache-memory-bytes 2G", "kv_cache_memory_bytes", 2 << 30),
        ("-tp 1", "tensor_parallel_size", 1),
        ("-tp=1", "tensor_parallel_size", 1),
        ("-q gguf", "quantization", "gguf"),
        ("--no-enable-prefix-caching", "enable_prefix_caching", False),
        ("--no_enable_prefix_caching", "enable_prefix_caching", False),
        ("--enable-prefix-caching=false", "enable_prefix_caching", False),
        ("--gpu-memory-utilization .5e0", "gpu_memory_utilization", ConfigError),
        ("--gpu-memory-utilization 0.5", "gpu_memory_utilization", 0.5),
        ("--device-memory-utilization 0.5", "gpu_memory_utilization", 0.5),
        ("--served-model-name a b --port 1", "served_model_name", ("a", "b")),
        ("--served-model-name a ./m", "model", "./m"),
        ("--api-key k1 k2", "api_key", ("k1", "k2")),
        ("./m --port 1", "model", "./m"),
        ("--port 1 ./m", "model", "./m"),
        ("./m --model ./m", "model", "./m"),
        (
            "--default-chat-template-kwargs.enable_thinking false",
            "default_chat_template_kwargs",
            {"enable_thinking": False},
        ),
        ('--override-generation-config {"top_k":5}', "override_generation_config", {"top_k": 5}),
    ],
)
def test_spellings(line: str, name: str, value: Any) -> None:
    if value is ConfigError:
        with pytest.raises(ConfigError):
            options(line)
    else:
        assert getattr(options(line).options, name) == value


@pytest.mark.parametrize(
    ("line", "needle"),
    [
        ("--max-model-length 5", "--max-model-len"),
        ("--gpu-memory-utilisation 0.5", "--gpu-memory-utilization"),
        ("--port", "--port needs a value"),
        ("--port --host x", "--port needs a value"),
        ("--port 99999", "0 to 65535"),
        ("--port 1.5", "whole number"),
        ("--max-model-len 8q", "8192"),
        ("--max-model-len 0", "1 or more"),
        ("--gpu-memory-utilization 1.5", "0.01 to 1"),
        ("--device tpu", "cuda"),
        ("--dtype bfloat17", "bfloat16"),
        ("--load-format bin", "--load-format pt"),
        ("--default-mm-loras x", "adapters"),
        ("--speculative-model x", "--speculative-config"),
        ("--pipeline-parallel-size 2", "--tensor-parallel-size shares each layer"),
        ("--enable-prefix-caching=maybe", "true or false"),
        ("--override-generation-config nonsense", "JSON"),
        ("a b --served-model-name x y z", "3 names for 2 models"),
        ("--model a --models b", "list of models"),
        ("--models [nonsense", "JSON"),
    ],
)
def test_errors_name_the_flag_and_the_cure(line: str, needle: str) -> None:
    with pytest.raises(ConfigError) as error:
        options(line)
    assert needle in str(error.value)
    assert error.value.remedy
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "a b --served-model-name x y --threads 3",
        "--model a --served-model-name x --model b --served-model-name y --threads 3",
        '--models [{"model":"a","served-model-name":"x"},{"model":"b","served_model_name":["y"]}] --threads=3',
    ],
)
def test_several_models(line: str) -> None:
    settings = options(line)
    first, second = each_model(settings)
    assert (first.model, first.served_model_name, first.keep_alive) == ("a", ("x",), "-1")
    assert (second.model, second.served_model_name, second.keep_alive) == ("b", ("y",), None)
    assert first.threads == second.threads == 3 and first.models == ()
    assert settings.notices == () and settings.origins["models"] == "command line"


def test_a_list_of_models_in_a_file() -> None:
    models = ["./a", {"model": "./b", "max-model-len": "8k", "keep_alive": -1, "no-enable-prefix-caching": True}]
    file = {"models": models, "max_model_len": 1000, "port": 1, "keep-alive": "1h"}
    first, second = each_model(options("", {}, file))
    assert (first.model, first.max_model_len, first.keep_alive, first.port) == ("./a", 1000, "-1", 1)
    assert (second.max_model_len, second.keep_alive, second.enable_prefix_caching) == (8000, "-1", False)
    for wrong, needle in (
        ({"model": "a", "port": 1}, "port is for all models"),
        ({"model": "a", "prot": 1}, "models, number 1: unknown option prot"),
        ({"threads": 1}, "names no model"),
        ({"model": "a", "pipeline-parallel-size": 2}, "tensor-parallel-size"),
    ):
        with pytest.raises(ConfigError, match=needle) as error:
            each_model(options("", {}, {"models": [wrong]}))
        assert error.value.remedy
    with pytest.raises(ConfigError, match="list of models"):
        options("", {}, {"models": [1]})


def test_the_same_option_twice_is_a_line_not_an_error() -> None:
    settings = options("--port 1 --port=2")
    assert settings.options.port == 2
    assert len(settings.notices) == 1 and "--port" in settings.notices[0]
    assert options("", file={"max-model-len": 5, "max_model_len": 6}).options.max_model_len == 6


def test_a_key_given_twice_is_not_shown() -> None:
    assert "secret" not in str(options("--api-key one --api-key secret").notices)


def test_flags_without_effect_say_so() -> None:
    notices = options("--enforce-eager --trust-remote-code --swap-space 4 -O3 --compilation-config.mode 3").notices
    assert any("CUDA graphs" in line for line in notices)
    assert any("never run" in line for line in notices)
    assert len(notices) == 5
    assert options("--gpu-memory-utilization 0.9").notices
    assert not options("--port 1").notices


def test_the_default_of_a_refused_flag_is_accepted() -> None:
    assert options("--pipeline-parallel-size 1 --no-enable-lora").options == Options()


@pytest.mark.parametrize(
    ("environ", "line", "model", "names"),
    [
        ({"MODEL_NAME": "./m"}, "", "./m", ()),
        ({"MODEL_NAME": "short"}, "./m", "./m", ("short", "./m")),
        ({"MODEL_NAME": "short", "VLLM_MODEL_PATH": "/m"}, "", "/m", ("short", "/m")),
        ({"MODEL_NAME": "short"}, "./m --served-model-name mine", "./m", ("mine",)),
        ({"VLLM_MODEL_PATH": "/m"}, "", "/m", ()),
        ({"VLLM_MODEL_PATH": "/m", "PAGODA_MODEL": "/p"}, "", "/p", ()),
    ],
)
def test_model_name_variable(environ: dict[str, str], line: str, model: str, names: tuple[str, ...]) -> None:
    settings = options(line, environ)
    assert settings.options.model == model
    assert settings.options.served_model_name == names


@pytest.mark.parametrize("written", ["http://a http://b", '["http://a","http://b"]'])
def test_several_values_are_words_or_one_list_in_json(written: str) -> None:
    assert options(f"--allowed-origins {written}").options.allowed_origins == ("http://a", "http://b")
    environ = {"PAGODA_ALLOWED_ORIGINS": '["http://a", "http://b"]'}
    assert options("", environ).options.allowed_origins == ("http://a", "http://b")
    assert options("--allowed-origins [::1]").options.allowed_origins == ("[::1]",)


def test_variables_of_the_guides() -> None:
    environ = {"MAX_MODEL_LEN": "2048", "GPU_MEMORY_UTILIZATION": "0.9", "TENSOR_PARALLEL_SIZE": "1"}
    got = options("", {**environ, "VLLM_API_KEY": "k"}).options
    assert (got.max_model_len, got.gpu_memory_utilization, got.tensor_parallel_size) == (2048, 0.9, 1)
    assert got.api_key == ("k",)


def test_every_option_has_a_variable() -> None:
    values = {
        "bool": "false",
        "int": "2",
        "float": "0.5",
        "str": "x",
        "tuple[str, ...]": "a,b",
        "tuple[Mapping[str, Any], ...]": "a,b",
        "Mapping[str, Any]": "{}",
    }
    for setting in declared():
        text = setting.choices[-1] if setting.choices else values[setting.kind]
        settings = options("", {f"PAGODA_{setting.name.upper()}": text})
        assert settings.origins[setting.name] == f"environment PAGODA_{setting.name.upper()}", setting.name


def test_a_mistyped_variable_is_named() -> None:
    assert "PAGODA_MAX_MODEL_LEN" in options("", {"PAGODA_MAX_MODEL_LENGTH": "5"}).notices[0]
    assert not options("", {"PAGODA_CACHE": "/x", "PAGODA_DEBUG": "1"}).notices


@pytest.mark.parametrize(
    ("line", "needle"),
    [
        ("--quantization squeezellm", "dead"),
        ("--quantization bitsandbytes", "int8, int4 and fp8"),
        ("--dtype int8 --quantization int4", "contradict"),
        ("--quantization something", "not supported"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(line: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        check(options(line))


def test_what_it_can_do_is_not() -> None:
    for line in ("gguf --dtype half", "awq", "awq_marlin", "gptq", "gptq_marlin", "int8", "int4", "int4 --dtype int4"):
        check(options("-tp 1 --quantization " + line))


def test_engine_config_carries_the_engine_options() -> None:
    line = "--dtype half --max-model-len 8k --max-num-seqs 4 --max-num-batched-tokens 64 --gpu-memory-utilization 0.3 "
    line += "--kv-cache-memory-bytes 1M --num-gpu-blocks-override 9 --threads 2 --device cpu --no-enable-prefix-caching"
    config = options(line).options.engine_config("/m")
    assert (config.model, config.dtype, config.max_model_len, config.max_num_seqs) == ("/m", "float16", 8000, 4)
    assert (config.max_num_batched_tokens, config.memory_share, config.kv_cache_bytes) == (64, 0.3, 1 << 20)
    assert (config.num_blocks, config.threads, config.device, config.prefix_caching) == (9, 2, "cpu", False)


def test_weights_are_quantized_on_load_under_either_name() -> None:
    for line in ("--dtype int8", "--quantization int8", "-q int8 --dtype int8"):
        config = options(line).options.engine_config("/m")
        assert (config.quantization, config.dtype) == ("int8", "auto")
    config = options("-q int4 --dtype half").options.engine_config("/m")
    assert (config.quantization, config.dtype) == ("int4", "float16")


def test_help_and_page_hold_every_option() -> None:
    text, table = serve_help(), page()
    assert "Examples:" in text and "pagoda serve" in text
    for setting in (*declared(), *without_effect()):
        assert setting.flag in text
    for setting in (*declared(), *without_effect(), *not_yet()):
        assert f"`{setting.flag}" in table
        assert setting.help


def test_names_are_declared_once() -> None:
    names = [s.name for s in (*declared(), *without_effect(), *not_yet())]
    assert len(names) == len(set(names))


def test_every_flag_of_vllm_is_known() -> None:
    """Honoured, accepted with a reason or refused with one: the flags are those of vLLM 0.32's help."""
    catalog = Catalog()
    flags = (Path(__file__).parent / "data" / "vllm_flags.txt").read_text().split()
    assert len(flags) > 250
    assert [flag for flag in flags if catalog.find(flag) is None] == []
