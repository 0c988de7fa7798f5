"""Hybrids that begin behind a prefix: kept states of each executor, and the answers, over chats, restarts and HTTP."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_tiny
import numpy as np
import pytest
import torch
from checkpoints import VOCAB, write_checkpoint
from reference_plans import make_plan
from server_process import running, serve
from test_engine_restart import over_kills, undisturbed
from test_gpt2 import logits
from test_hybrid import DEVICES, TOKENS, alone, core, last, load

from pagoda.arch import memory
from pagoda.arch.delta import DeltaNet
from pagoda.arch.mamba import Mamba
from pagoda.arch.recurrence import Recurrence
from pagoda.arch.registry import load_spec
from pagoda.arch.short_conv import ShortConv
from pagoda.backend.base import Limits
from pagoda.backend.torch import delta as nets
from pagoda.backend.torch import ops
from pagoda.backend.torch.graphs import padding
from pagoda.engine.core import EngineCore
from pagoda.engine.stream import merge
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Delta, Request, SamplingParams
from pagoda.weights.open import open_source

LONG: list[int] = np.random.default_rng(1).integers(3, VOCAB, 200).tolist()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    write_checkpoint(path, "qwen3.5", max_position_embeddings=1024)
    return path


def kept(*rows: tuple[int, int, int]) -> Any:
    return np.array(rows, np.int32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_kept_state_has_the_bits_of_the_request(device: str, dense: Path) -> None:
    """One leaves its state in the middle of a step, beside another; two begin with them, in one step."""
    executor = load(dense, device, kept_states=3, num_blocks=40)
    assert executor.capacity.kept_states == 3
    assert executor.capacity.kv_bytes >= 7 * memory.state_bytes(load_spec(open_source(str(dense))))
    first, other = TOKENS[:30], TOKENS[::-1]
    whole = logits(executor, make_plan([last(first)], VOCAB))[0]
    logits(executor, make_plan([last(other[:9], 0, (8,))], VOCAB, slots=[1]))
    leaves = make_plan([last(first), last(other[9:20], 9, (8, 9))], VOCAB)
    found = logits(executor, replace(leaves, kept=kept((-1, 5, 16), (-1, 6, 16))))
    assert np.array_equal(found[0], whole)
    begin = [last(first[16:], 16, (0, 2)), last(other[16:], 16, (8, 10, 11))]
    found = logits(executor, replace(make_plan(begin, VOCAB, slots=[3, 2]), kept=kept((5, -1, -1), (6, 4, 32))))
    beside = logits(executor, make_plan([last(other, 0, (20, 21, 22))], VOCAB))[0]
    assert np.array_equal(found[0], whole) and np.array_equal(found[1], beside)
    again = make_plan([last(other[32:], 32, (8, 10, 12))], VOCAB, slots=[1])
    assert np.array_equal(logits(executor, replace(again, kept=kept((4, -1, -1))))[0], beside)


@pytest.mark.parametrize("d", [DeltaNet(1, 2, 8, 8, 4), ShortConv(24, 3), Mamba(2, 4, 8, 8, 4, 1e-6)])
def test_the_kernels_move_states_as_pytorch_does(d: Recurrence, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    taps = torch.randn(d.kernel, d.width)
    layer: nets.Delta | nets.Convolution | nets.StateSpace
    if isinstance(d, ShortConv):
        layer, width = nets.Convolution(d, taps), 3 * d.channels
    elif isinstance(d, Mamba):
        bias, heads = torch.randn(d.width), torch.rand(3, 4)
        layer = nets.StateSpace(d, taps, bias, heads[0], heads[1], heads[2], torch.rand(32))
        width = d.width + d.value_width + d.value_heads
    else:
        layer = nets.Delta(d, taps, torch.rand(2), torch.rand(2), torch.rand(8), 1e-6)
        width = d.width + d.value_width + 2 * d.value_heads
    plain, fused = nets.make_states(d, 5, torch.device("cpu")), nets.make_states(d, 5, torch.device("cpu"))
    steps: list[tuple[list[int], list[int], Any]] = [
        ([6, 2], [0, 0], [(-1, 4, 2), (-1, -1, -1)]),
        ([2, 4], [2, 2], [(4, -1, -1), (-1, 3, 6)]),
        ([1, 1], [4, 6], None),
        ([1, 3], [6, 7], [(3, 4, 7), (-1, -1, -1)]),
    ]
    for counts, positions, rows in steps:
        starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
        batch = replace(
            padding(2, 16, torch.device("cpu"), three=False),
            starts=starts,
            contexts=torch.tensor(positions, dtype=torch.int32) + starts.diff(),
            slots=torch.tensor([2, 0], dtype=torch.int32),
            kept=None if rows is None else torch.tensor(rows, dtype=torch.int32),
        )
        x = torch.randn(sum(counts), width)
        expected = layer(x, plain, batch)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "on_gpu", lambda x: True)
            found = layer(x, fused, batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_states_are_kept_in_a_part_of_what_is_left(dense: Path) -> None:
    spec = load_spec(open_source(str(dense)))
    each, block = memory.state_bytes(spec), memory.kv_bytes_per_block(spec)

    def kept(left: int, **more: Any) -> memory.Fit:
        limits = Limits(256, 2, 64, memory_share=1.0, **{"kept_states": 9, "num_blocks": 16, **more})
        return memory.fit(spec, limits, free_bytes=2 * each + left, weight_bytes=0, activation_bytes=0)

    assert kept(100 * each + 16 * block) == (16, 9)
    assert kept(12 * each) == (16, 3)
    assert kept(100 * each, kept_states=0) == (16, 0)
    assert kept(64 * block + each // 2, num_blocks=64) == (64, 0)  # the cache that must be there comes first
    assert kept(40 * each, num_blocks=None) == (32, 9)


def test_places_that_do_not_exist_are_refused(dense: Path) -> None:
    executor = load(dense, "cpu", kept_states=1)
    for row in ((5, -1, -1), (-1, 5, 16), (-1, 4, 40), (-1, 4, 0)):
        with pytest.raises(Exception, match="step"):
            logits(executor, replace(make_plan([last(TOKENS[:30])], VOCAB), kept=kept(row)))
    assert np.array_equal(logits(executor, make_plan([last(TOKENS)], VOCAB))[0], alone(dense, "cpu", TOKENS))


def told(
    engine: EngineCore, *prompts: list[int], known: tuple[int, ...] = (), most: int = 70, eos: int = -1
) -> list[Delta]:
    """What each of some requests gets, greedy and seeded in turns."""
    out = []
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=i % 2, seed=i, max_tokens=most, ignore_eos=True, logprobs=1)
        name = str(i)
        out.append(Delta(request_id=name))
        request = Request(request_id=name, prompt_token_ids=prompt, params=params, output_token_ids=list(known))
        request.eos_token_ids = () if eos < 0 else (eos,)
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None
            out[int(delta.request_id)] = merge([out[int(delta.request_id)], delta])
    engine._scheduler.check()
    return out


def same(first: Delta, second: Delta) -> bool:
    return (first.token_ids, first.logprobs) == (second.token_ids, second.logprobs)


@pytest.mark.parametrize("device", DEVICES)
def test_a_chat_of_three_turns(device: str, dense: Path) -> None:
    """Each turn computes only what is new, and gets what an engine without a cache gives."""
    options = {"max_model_len": 512, "num_blocks": 64, "max_num_batched_tokens": 48}
    engine, without = core(dense, device, **options), core(dense, device, **options, prefix_caching=False)
    history, expected = LONG[:40], [0, 64, 192]
    for turn in range(3):
        (found,) = told(engine, history)
        assert found.cached_tokens == expected[turn]
        (plain,) = told(without, history)
        assert plain.cached_tokens == 0 and same(found, plain)
        history = history + found.token_ids + LONG[40 + turn : 60 + turn]


@pytest.mark.parametrize("device", ["reference", "cpu", pytest.param("torch-cpu", marks=pytest.mark.slow)])
def test_a_shared_prefix_preemption_and_a_restart(device: str, dense: Path) -> None:
    prompts = [LONG[:100] + LONG[100 + i : 130 + i] for i in range(3)]
    options = {"max_model_len": 256, "max_num_batched_tokens": 48}
    expected = [told(core(dense, device, **options, prefix_caching=False), *prompts)[i] for i in range(3)]
    engine = core(dense, device, **options, num_blocks=26, max_num_seqs=3)
    assert [found.cached_tokens for found in (*told(engine, prompts[0]), *told(engine, prompts[1]))] == [0, 0]
    together = told(engine, *prompts)
    assert [found.cached_tokens for found in together] == [112, 112, 96]
    assert all(map(same, together, expected))
    assert engine.stats().scheduler.preemptions > 0
    known = tuple(expected[0].token_ids[:50])
    for resuming in (engine, core(dense, device, **options)):
        assert told(resuming, prompts[0], known=known)[0].token_ids == expected[0].token_ids[50:]


def test_who_shares_a_first_message_waits_for_its_state(dense: Path) -> None:
    """One of those that come at once computes it, and the state behind it serves all others, now and later."""
    options = {"max_model_len": 256, "max_num_batched_tokens": 48, "num_blocks": 64}
    end = 2
    prompts = [[*LONG[:100], end, *LONG[100 + 5 * i : 160 + 5 * i]] for i in range(4)]
    engine, plain = core(dense, "cpu", **options), core(dense, "cpu", **options, prefix_caching=False)
    together = told(engine, *prompts[:3], eos=end)
    assert [found.cached_tokens for found in together] == [0, 96, 96]
    assert all(map(same, together, told(plain, *prompts[:3], eos=end)))
    assert told(engine, prompts[3], eos=end)[0].cached_tokens == 96
    assert [found.cached_tokens for found in told(core(dense, "cpu", **options), *prompts)] == [0, 0, 96, 96]
    again = told(core(dense, "cpu", **options), *[prompts[0]] * 3)
    assert [found.cached_tokens for found in again] == [0, 144, 144]


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_streams_outlive_the_engine(dense: Path, device: str) -> None:
    """kill -9 in the middle: prompts that share a prefix, in one that goes on with what it had left."""
    config = EngineConfig(
        model=str(dense), device=device, max_model_len=256, num_blocks=64, threads=1, max_num_batched_tokens=64
    )
    wanted = []
    for i in range(5):
        params = SamplingParams(seed=i, max_tokens=70, temperature=float(i % 2), logprobs=1, ignore_eos=True)
        wanted.append(Request(request_id=str(i), prompt_token_ids=LONG[: 100 + i], params=params))
    expected = undisturbed(config, wanted)

    for one, deltas in zip(wanted, over_kills(config, wanted, 60), strict=True):
        got = merge(deltas)
        assert len(got.token_ids) == 70 and same(got, expected[one.request_id])


def post(url: str, **body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        text = reply.read().decode()
    if not body.get("stream"):
        return json.loads(text)
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_a_chat_over_http(tmp_path: Path) -> None:
    """Whole and streamed; what is read from the cache is told, and another salt shares none of it."""
    engine_tiny.write(tmp_path)
    write_checkpoint(tmp_path, "qwen3.5", vocab_size=258, max_position_embeddings=1024)
    options = ("--device", "cpu", "--max-model-len", "1024", "--max-num-seqs", "2", "--served-model-name", "hybrid")
    asked = {"model": "hybrid", "temperature": 0, "max_tokens": 70, "ignore_eos": True}
    with running(*serve(str(tmp_path), *options)) as address:
        url, messages, before = address + "/v1/chat/completions", [], 0
        for turn in range(3):
            messages.append({"role": "user", "content": f"This is what I have to say in turn {turn}, and no more."})
            chunks = post(url, messages=messages, stream=True, stream_options={"include_usage": True}, **asked)
            text = "".join(choice["delta"].get("content") or "" for c in chunks for choice in c["choices"])
            usage = chunks[-1]["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= before - 24
            before = usage["prompt_tokens"]
            salted = post(url, messages=messages, cache_salt=str(turn), **asked)
            assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert salted["choices"][0]["message"]["content"] == text
            messages.append({"role": "assistant", "content": text})
