"""Tensor parallel over processes of the CPU: parts that make up the whole, the tokens of one rank, deaths, refusals."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_tiny
import httpx
import numpy as np
import psutil
import pytest
import torch
import torch_short_rank
from api_fake import on_port
from checkpoints import VOCAB, make_model, write_checkpoint, write_gguf_checkpoint
from packed_checkpoints import write
from reference_plans import Feed, make_plan
from test_gpt_oss import write_mxfp4
from test_torch_formats import write_fp8

from pagoda.arch.registry import bind, load_spec
from pagoda.arch.sharding import check_size, share, vocab_range
from pagoda.backend.base import Limits
from pagoda.backend.select import load_executor
from pagoda.backend.torch import ops, parallel
from pagoda.backend.torch.group import _packed, _unpacked
from pagoda.backend.torch.parallel import ParallelExecutor
from pagoda.cli.serve import make_server
from pagoda.engine.client import EngineClient
from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, MemoryShort, ModelError
from pagoda.options.config import Options
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request, SamplingParams
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import MadeTensor
from pagoda.weights.open import open_source
from pagoda.weights.parts import INPUTS, OUTPUTS, part

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


def _awq(folder: Path) -> None:
    write(folder, "llama", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})


def _gptq(folder: Path) -> None:
    write(folder, "llama", {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False})


def _gptq_in_order_of_activations(folder: Path) -> None:
    write(folder, "llama", {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True})


def _fp8(folder: Path) -> None:
    write_fp8(folder, "block", 256)


def _experts(folder: Path) -> None:
    write_checkpoint(folder, "qwen2-experts")  # with one that every token shares


def _gguf(folder: Path) -> None:
    write_gguf_checkpoint(folder / "tiny.gguf", make_model("qwen3", **WIDE), "Q4_0")


def _biases(folder: Path) -> None:
    write_checkpoint(folder, "qwen3-biases", **WIDE)


def _gpt2(folder: Path) -> None:
    write_checkpoint(folder, "gpt2")


def _gpt_oss(folder: Path) -> None:
    write_mxfp4(folder)


def _gemma(folder: Path) -> None:
    write_checkpoint(folder, "gemma2", **WIDE)


MODELS: dict[str, Callable[[Path], object]] = {
    f.__name__.strip("_"): f
    for f in (_awq, _gptq, _gptq_in_order_of_activations, _fp8, _experts, _gguf, _biases, _gpt2, _gpt_oss, _gemma)
}
_SUMMED = ("o_bias", "down_bias", "down_experts_bias")


def _joined(slot: str, parts: list[np.ndarray], whole: np.ndarray) -> np.ndarray:
    """Parts of one tensor side by side, along the axis in which they are smaller than the whole."""
    axes = [axis for axis in range(whole.ndim) if parts[0].shape[axis] != whole.shape[axis]]
    return np.concatenate(parts, axes[0]) if axes else parts[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_make_up_the_whole(name: str, tmp_path: Path) -> None:
    MODELS[name](tmp_path)
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    tensors = bind(spec, source)
    check_size(spec, tensors, 2)
    shares = [share(spec, tensors, rank, 2)[1] for rank in range(2)]
    assert sum(t.nbytes for t in shares[0].values()) < 0.75 * sum(t.nbytes for t in tensors.values())
    for slot, tensor in tensors.items():
        whole = dequantize(tensor).reshape(tensor.shape)
        if slot.endswith(_SUMMED):
            assert slot in shares[0] and slot not in shares[1]
            continue
        parts = [dequantize(own[slot]).reshape(own[slot].shape) for own in shares]
        assert np.array_equal(_joined(slot, parts, whole), whole), slot


def test_few_kv_heads_are_on_several_ranks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    tensors = bind(spec, source)
    keys = [dequantize(share(spec, tensors, rank, 4)[1]["layers.0.k"]).reshape(16, 64) for rank in range(4)]
    whole = dequantize(tensors["layers.0.k"]).reshape(2, 16, 64)
    assert [np.array_equal(key, whole[rank // 2]) for rank, key in enumerate(keys)] == [True] * 4
    own = share(spec, tensors, 3, 4)[0].layers[0]
    assert (own.attention.heads, own.attention.kv_heads, own.mlp.size) == (1, 1, 32)


def test_a_part_is_read_from_its_own_place_only(tmp_path: Path) -> None:
    """What lies in one piece is a view of the mapped file; of packed matrices it is the words of the part."""
    write_checkpoint(tmp_path, "llama")
    tensors = open_source(str(tmp_path)).tensors
    up = next(t for n, t in tensors.items() if n.endswith("up_proj.weight"))
    own = part(up, OUTPUTS, 64, 128)
    assert np.shares_memory(own.data, up.data) and own.nbytes * 2 == up.nbytes
    packed = tmp_path / "awq"
    packed.mkdir()
    _awq(packed)
    down = next(t for n, t in open_source(str(packed)).tensors.items() if n.endswith("down_proj.weight"))
    cut = part(down, INPUTS, 128, 256)
    assert isinstance(cut, MadeTensor) and isinstance(down, MadeTensor)
    words = (cut.origin.words, down.origin.words)  # type: ignore[attr-defined]
    assert np.shares_memory(words[0].data, words[1].data) and words[0].nbytes * 2 == words[1].nbytes


def test_what_is_stored_together_is_not_cut(tmp_path: Path) -> None:
    _awq(tmp_path)
    down = next(t for n, t in open_source(str(tmp_path)).tensors.items() if n.endswith("down_proj.weight"))
    with pytest.raises(ModelError, match="stored together"):
        part(down, INPUTS, 0, 16)
    wide = tmp_path / "wide"
    wide.mkdir()
    write(wide, "llama", {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"})
    down = next(t for n, t in open_source(str(wide)).tensors.items() if n.endswith("down_proj.weight"))
    with pytest.raises(ModelError, match="groups are of 64"):
        part(down, INPUTS, 32, 128)


def test_sizes_that_cannot_work_are_refused_with_those_that_can(tmp_path: Path) -> None:
    write(tmp_path, "llama", {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"})
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    tensors = bind(spec, source)
    for size in (3, 8):
        with pytest.raises(ConfigError, match=r"do not divide by \d. Sizes that work: 1, 2, 4$"):
            check_size(spec, tensors, size)
    blocks = tmp_path / "fp8"
    blocks.mkdir()
    write_fp8(blocks, "block")  # 192 outputs of gate in blocks of 64
    source = open_source(str(blocks))
    with pytest.raises(ConfigError, match=r"Sizes that work: 1$"):
        check_size(load_spec(source), bind(load_spec(source), source), 2)
    odd = replace(spec, vocab_size=131)
    assert [vocab_range(odd, rank, 2) for rank in range(2)] == [(0, 128), (128, 131)]


def test_more_ranks_than_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "llama")
    source = open_source(str(tmp_path))
    limits = Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, tensor_parallel_size=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match=r"needs 2 GPUs, and PyTorch finds 1 \(CUDA_VISIBLE_DEVICES is '3'\)"):
        ParallelExecutor.load(load_spec(source), source, limits)
    with pytest.raises(ConfigError, match="on the CPU here, where only 1 works"):
        load_executor("cpu", load_spec(source), source, limits)


def test_a_step_crosses_as_one_array_of_numbers() -> None:
    feeds = [Feed([5, 6, 7], 20, [3, 9], rows=[(0, -1, -1), (2, -1, -1)]), Feed([8], 0, [2], rows=[(0, -1, -1)])]
    plan = make_plan(feeds, VOCAB, slots=[2, 0])
    fed = _unpacked(_packed(plan))
    assert fed.block_tables[fed.slots].tolist() == [[3, 9], [2, 0]]
    for name in ("slots", "starts", "positions", "tokens", "rows"):
        assert np.array_equal(getattr(fed, name), getattr(plan, name)), name
    assert len(_packed(plan)) == 7 + 2 + 3 + 2 + 4 + 4 + 3 and fed.kept is None
    copied = np.array([(3, 4, 21), (-1, -1, -1)], np.int32)
    told = _unpacked(_packed(replace(plan, kept=copied)))
    assert told.kept is not None and np.array_equal(told.kept, copied)


def config(path: Path, size: int, **more: Any) -> EngineConfig:
    table = {"num_blocks": 64, "max_num_seqs": 4, "max_num_batched_tokens": 40, "speculation": None, **more}
    return EngineConfig(model=str(path), device="torch-cpu", tensor_parallel_size=size, **table)


def answers(path: Path, size: int, **more: Any) -> dict[str, Any]:
    """Tokens of six requests, computed in company, prompts in chunks; and what each rank holds."""
    core = EngineCore(config(path, size, **more))
    told: dict[str, Any] = {str(i): [] for i in range(6)}
    for i in range(6):
        prompt = [3 + (7 * i + 5 * j) % (VOCAB - 3) for j in range(5 + 13 * i)]
        drawn = {"temperature": 0.8, "seed": i, "top_k": 40} if i == 5 else {"temperature": 0.0}
        params = SamplingParams(max_tokens=12, ignore_eos=True, prompt_logprobs=0 if i == 4 else None, **drawn)
        core.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    while core.has_work:
        for delta in core.step():
            told[delta.request_id] += delta.token_ids
    assert all(len(tokens) == 12 for tokens in told.values())
    assert core.info.device.startswith(f"torch ({size} x " if size > 1 else "torch (P")
    told["bytes"] = (core.info.weight_bytes, core.info.kv_bytes)
    core.close()
    return told


def _same(path: Path, size: int, kv_parts: int) -> None:
    one, many = answers(path, 1), answers(path, size)
    (weights, cache), (own_weights, own_cache) = one.pop("bytes"), many.pop("bytes")
    assert many == one
    assert own_weights < 0.75 * weights and own_cache * kv_parts == cache
    assert _followers() == []


@pytest.mark.slow
def test_four_ranks_with_two_kv_heads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    _same(tmp_path, 4, 2)


def test_two_ranks_with_one_kv_head_and_a_tied_head_of_uneven_parts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2-tied", vocab_size=VOCAB + 5, num_key_value_heads=1)
    _same(tmp_path, 2, 1)


# Each starts a process that imports PyTorch; test_the_parts_make_up_the_whole tries what each rank gets in all of them.
QUICK = ("gptq_in_order_of_activations", "fp8", "gpt_oss")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n not in QUICK)])
def test_two_ranks(name: str, tmp_path: Path) -> None:
    MODELS[name](tmp_path)
    _same(tmp_path, 2, 2)


def test_random_weights_are_the_same_at_each_rank(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    one, many = (answers(tmp_path, size, load_format="dummy") for size in (1, 2))
    assert one.pop("bytes") > many.pop("bytes")
    assert many == one


def test_a_rank_without_memory_for_a_step_gets_smaller_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails where the others wait for it: before the first sum, between two, and where the logits are gathered."""
    write_checkpoint(tmp_path, "llama")
    one = answers(tmp_path, 1)
    monkeypatch.setenv("SHORT_RANK_TELLS", str(tmp_path / "told"))
    monkeypatch.setattr(parallel, "_COMMAND", (sys.executable, torch_short_rank.__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    many = answers(tmp_path, 2)
    assert one.pop("bytes") > many.pop("bytes")
    assert many == one
    assert set((tmp_path / "told").read_text().split()) == {"upload", "attention", "head"}


def test_rank_0_without_memory_for_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second layer: halves; where even one token is too much its request fails, and the next one does not."""
    write_checkpoint(tmp_path, "llama")
    core = EngineCore(config(tmp_path, 2, prefix_caching=False))
    prompt = list(range(3, 33))
    whole, most, failed = ops.paged_attention, 40, []

    def short(q: torch.Tensor, k_cache: torch.Tensor, *args: Any) -> torch.Tensor:
        if len(q) > most and k_cache is core._executor.decoder.caches[1][0]:  # type: ignore[attr-defined]
            failed.append(len(q))
            raise torch.OutOfMemoryError("no memory")
        return whole(q, k_cache, *args)

    monkeypatch.setattr(ops, "paged_attention", short)
    wanted = _answer(core, "a", prompt)
    assert (len(wanted[0]), wanted[1]) == (8, None) and not failed
    most = 8
    assert _answer(core, "b", prompt) == wanted
    assert failed == [30, 15]
    most = 0
    assert _answer(core, "c", prompt) == ([], "the GPU has no memory left for this step")
    most = 40
    assert _answer(core, "d", prompt) == wanted
    core.close()
    assert _followers() == []


def _answer(core: EngineCore, name: str, prompt: list[int]) -> tuple[list[int], str | None]:
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
    core.add(Request(request_id=name, prompt_token_ids=prompt, params=params))
    tokens, error = [], None
    while core.has_work:
        for delta in core.step():
            tokens += delta.token_ids
            error = error or delta.error
    return tokens, error


def test_a_rank_that_fails_is_heard_by_all(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    with pytest.raises(MemoryShort):
        EngineCore(config(tmp_path, 2, num_blocks=1 << 40))
    assert _followers() == []


def _followers() -> list[psutil.Process]:
    running = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in running if "pagoda.backend.torch.rank" in p.cmdline()]


def test_a_stream_outlives_the_death_of_a_rank(tmp_path: Path) -> None:
    path = engine_tiny.write(tmp_path)
    options = Options(
        model=path, device="torch-cpu", tensor_parallel_size=2, served_model_name=("m",), num_gpu_blocks_override=32
    )
    body = {"model": "m", "prompt": "hello", "max_tokens": 150, "temperature": 0, "stream": True, "ignore_eos": True}
    engine = EngineClient(options.engine_config(path), backoff_s=0.01)
    with on_port(make_server(options, path, engine), engine) as url:  # type: ignore[arg-type]
        undisturbed = list(_chunks(url, body))
        (follower,) = _followers()
        got = []
        for count, text in enumerate(_chunks(url, body)):
            got.append(text)
            if count == 3:
                os.kill(follower.pid, signal.SIGKILL)
        assert "".join(got) == "".join(undisturbed) != ""
        assert engine.restarts == 1 and _followers() != [follower]
    ended = time.monotonic() + 120
    while _followers() and time.monotonic() < ended:
        time.sleep(0.05)
    assert _followers() == []


def _chunks(url: str, body: dict[str, Any]) -> Any:
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
