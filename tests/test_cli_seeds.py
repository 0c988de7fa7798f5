"""Every serve command of the five guides, with vllm replaced by pagoda, is understood."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pagoda.cli.inputs import load, split
from pagoda.errors import ConfigError
from pagoda.options.check import check
from pagoda.options.resolve import Settings, each_model, resolve

GUIDE_0 = """python3 -m pagoda.entrypoints.openai.api_server \
  --model /home/user/vllm/models/qwen3-32b --served-model-name Qwen3-32B-AWQ --tensor-parallel-size 2 \
  --host 0.0.0.0 --port 8000 --enable-chunked-prefill --enforce-eager --trust-remote-code --load-format safetensors \
  --quantization awq_marlin --max-model-len 26624 --gpu-memory-utilization 0.95 --dtype half \
  --disable-custom-all-reduce"""
GUIDE_1 = "pagoda serve --host 0.0.0.0 --port 11434 --max-model-len 18480 --tensor-parallel-size 2 ./qwen3-32b"
GUIDE_2 = """python -m pagoda.entrypoints.openai.api_server --model meta-llama/Llama-2-7b-chat-hf --host 0.0.0.0 \
  --port 8000 --max-model-len 2048 --gpu-memory-utilization 0.9 --tensor-parallel-size 1"""
GUIDE_2_COMPOSE = "--model /models/Qwen3-4B-I-chat --host 0.0.0.0 --port 8000 --config {config}"
GUIDE_2_TWO = """python -m pagoda.entrypoints.openai.api_server --model meta-llama/Llama-2-7b-chat-hf \
  --model microsoft/DialoGPT-medium --host 0.0.0.0 --port 8000"""
GUIDE_4 = """pagoda serve /mnt/cfs/models/Qwen3-4B-Instruct --model /mnt/cfs/models/Qwen3-4B-Instruct --port 20000 \
  --host 0.0.0.0 --trust-remote-code --gpu-memory-utilization 0.3"""

QWEN = "/home/user/vllm/models/qwen3-32b"


def parse(command: str) -> Settings:
    words = shlex.split(command)
    start = next(i for i, w in enumerate(words) if w in ("serve", "pagoda.entrypoints.openai.api_server"))
    return resolve(words[start + 1 :], {})


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            GUIDE_0,
            {
                "model": QWEN,
                "served_model_name": ("Qwen3-32B-AWQ",),
                "tensor_parallel_size": 2,
                "host": "0.0.0.0",
                "port": 8000,
                "load_format": "safetensors",
                "quantization": "awq_marlin",
                "max_model_len": 26624,
                "gpu_memory_utilization": 0.95,
                "dtype": "half",
            },
        ),
        (GUIDE_1, {"model": "./qwen3-32b", "port": 11434, "max_model_len": 18480, "tensor_parallel_size": 2}),
        (GUIDE_2, {"model": "meta-llama/Llama-2-7b-chat-hf", "max_model_len": 2048, "gpu_memory_utilization": 0.9}),
        (GUIDE_4, {"model": "/mnt/cfs/models/Qwen3-4B-Instruct", "port": 20000, "gpu_memory_utilization": 0.3}),
    ],
)
def test_commands_are_understood(command: str, expected: dict[str, Any]) -> None:
    options = parse(command).options
    assert {name: getattr(options, name) for name in expected} == expected


def test_flags_of_guide_0_that_mean_nothing_here_are_explained() -> None:
    lines = "\n".join(parse(GUIDE_0).notices)
    for flag in ("--enable-chunked-prefill", "--enforce-eager", "--trust-remote-code", "--disable-custom-all-reduce"):
        assert flag in lines


def test_the_model_given_in_both_places_is_one_model() -> None:
    settings = parse(GUIDE_4)
    check(settings)
    assert any("twice" in line for line in settings.notices)


def test_two_models_behind_one_port() -> None:
    both = each_model(parse(GUIDE_2_TWO))
    assert [each.model for each in both] == ["meta-llama/Llama-2-7b-chat-hf", "microsoft/DialoGPT-medium"]
    assert {each.port for each in both} == {8000}


def test_two_gpus_on_a_cpu_are_refused_with_the_sizes_that_work() -> None:
    with pytest.raises(ConfigError, match="only 1 works"):
        check(parse(f"{GUIDE_1} --device cpu"))


@pytest.mark.parametrize("name", ["vllm_config.json", "vllm_config.yaml"])
def test_compose_file_of_guide_2(tmp_path: Path, name: str) -> None:
    content = {"max_model_len": 4096, "gpu-memory-utilization": 0.8, "dtype": "half", "trust_remote_code": True}
    config = tmp_path / name
    if name.endswith("json"):
        config.write_text(json.dumps(content))
    else:
        config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items()))
    settings = load(split(GUIDE_2_COMPOSE.format(config=config).split()), {"MODEL_NAME": "Qwen3-4B-I-chat"})
    options = settings.options
    assert options.served_model_name == ("Qwen3-4B-I-chat", "/models/Qwen3-4B-I-chat")
    assert (options.max_model_len, options.gpu_memory_utilization, options.dtype) == (4096, 0.8, "half")
    assert settings.origins["max_model_len"] == str(config)


def test_python_table_of_guide_3() -> None:
    """VLLM_CONFIG, with trust_remote_code in both places, as keyword arguments would give it."""
    table = {
        "max_model_len": 8192,
        "gpu_memory_utilization": 0.80,
        "tensor_parallel_size": 1,
        "dtype": "half",
        "max_num_seqs": 32,
        "trust_remote_code": True,
    }
    options = resolve([], {"VLLM_MODEL_PATH": "/root/models/Qwen"}, ("VLLM_CONFIG", table)).options
    assert (options.model, options.max_num_seqs, options.max_model_len) == ("/root/models/Qwen", 32, 8192)
    settings = resolve([], {}, ("VLLM_CONFIG", {**table, "dtype": "int8"}))
    assert settings.options.engine_config("/root/models/Qwen").quantization == "int8"
