"""Which device computes: a GPU where PyTorch finds one, and what is said where it does not; whole engines on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_tiny
import pytest
import torch

from pagoda.arch.registry import load_spec
from pagoda.backend import select
from pagoda.backend.base import Limits
from pagoda.backend.select import load_executor, resolve_device
from pagoda.backend.torch import device
from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, MemoryShort
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request, SamplingParams
from pagoda.weights.open import open_source

LIMITS = Limits(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64, num_blocks=24)
WITHOUT = "import sys; sys.modules['torch'] = None\n"


def run(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300).stdout


def test_nothing_imports_torch_on_a_cpu(tmp_path: Path) -> None:
    path = engine_tiny.write(tmp_path / "tiny")
    code = (
        "import sys, pagoda.cli.main, pagoda.cli.serve, pagoda.api.serving.server\n"
        "from pagoda.options.engine_config import EngineConfig; from pagoda.engine.core import EngineCore\n"
        "EngineCore(EngineConfig(model=sys.argv[1], device='cpu', num_blocks=32)).close()\n"
        "print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    assert run(code, path).strip() == "[]"


def test_without_torch_the_error_names_the_extra(tmp_path: Path) -> None:
    path = engine_tiny.write(tmp_path / "tiny")
    code = (
        WITHOUT + "from pagoda.options.engine_config import EngineConfig; from pagoda.engine.core import EngineCore\n"
        "from pagoda.errors import ConfigError\n"
        "try: EngineCore(EngineConfig(model=sys.argv[1], device='cuda'))\n"
        "except ConfigError as error: print(error, error.exit_code)"
    )
    said = "--device cuda needs torch, which is not installed. Run: pip install 'pagoda-llm[cuda]' 78"
    assert run(code, path).strip() == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    source = open_source(engine_tiny.write(tmp_path / "tiny"))
    spec = load_spec(source)
    assert resolve_device("auto", spec) == "cpu" and resolve_device("cuda", spec) == "cuda"
    with pytest.raises(ConfigError, match=r"--device cuda: this PyTorch .*Use --device cpu|finds no GPU"):
        load_executor("cuda", spec, source, LIMITS)


def test_why_pytorch_finds_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Its own words, which name an old driver, for instance."""
    spec = load_spec(open_source(engine_tiny.write(tmp_path / "tiny")))

    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(select, "_GPU_FILES", (str(tmp_path),))
    assert resolve_device("auto", spec) == "cpu"
    assert "finds no GPU: The NVIDIA driver on your system is too old (found version 11040).: the CPU" in caplog.text
    with pytest.raises(ConfigError, match="too old"):
        device.open_device(True)


def generate(config: EngineConfig, prompts: list[str], **params: object) -> list[list[int]]:
    core = EngineCore(config)
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=20, ignore_eos=True, seed=number, **params)  # type: ignore[arg-type]
        core.add(Request(request_id=str(number), prompt_token_ids=list(prompt.encode()), params=sampling))
    tokens: dict[str, list[int]] = {}
    while core.has_work:
        for delta in core.step():
            assert delta.error is None
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    core.close()
    return [tokens[str(number)] for number in range(len(prompts))]


PROMPTS = ["a", "one two three four five six seven", "one two three four five six eight", "x" * 70]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 0.5}])
def test_an_engine_gives_the_tokens_of_the_reference_whatever_the_batch(
    params: dict[str, float], tmp_path: Path
) -> None:
    path = engine_tiny.write(tmp_path / "tiny")
    config = EngineConfig(model=path, device="torch-cpu", num_blocks=64, max_num_seqs=4, speculation=None)
    wanted = generate(EngineConfig(model=path, device="reference", num_blocks=64), PROMPTS, **params)
    assert generate(config, PROMPTS, **params) == wanted
    small = EngineConfig(
        model=path, device="torch-cpu", num_blocks=20, max_num_seqs=2, max_num_batched_tokens=9, prefix_caching=False
    )
    assert generate(small, PROMPTS, **params) == wanted


def test_too_small_a_memory_is_refused_before_loading(tmp_path: Path) -> None:
    source = open_source(engine_tiny.write(tmp_path / "tiny"))
    seen: list[float] = []
    limits = Limits(max_model_len=128, max_num_seqs=1, max_num_batched_tokens=128, num_blocks=10**9)
    with pytest.raises(MemoryShort, match="KV cache of 16000000000 tokens"):
        load_executor("torch-cpu", load_spec(source), source, limits, lambda _, share: seen.append(share))
    assert not seen


def test_processes_on_a_gpu_are_named() -> None:
    rows = ["GPU-1, 1, 2048", f"GPU-1, {device.psutil.Process().pid}, 5", "GPU-2, 77, 9", "GPU-1, x, [N/A]", ""]
    (found,) = device._named(rows, "GPU-1")
    assert found.endswith("(process 1, 2.00 GiB)")


def test_types_of_computation() -> None:
    old = device.Device(torch.device("cuda", 0), "an old one", (7, 5))
    new = device.Device(torch.device("cuda", 0), "a new one", (9, 0))
    assert device.choose_dtype("auto", {"torch_dtype": "bfloat16"}, old) == torch.float16
    assert device.choose_dtype("auto", {"torch_dtype": "float16"}, new) == torch.float16
    assert device.choose_dtype("auto", {"dtype": "float32"}, new) == torch.bfloat16
    assert device.choose_dtype("float32", {}, new) == torch.float32
    assert not old.fp8 and new.fp8
    with pytest.raises(ConfigError, match="no bfloat16"):
        device.choose_dtype("bfloat16", {}, old)
