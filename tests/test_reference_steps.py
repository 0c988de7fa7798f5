"""Steps of the reference executor: paged, shared, chunked and mixed, with the same bits as one request alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import VOCAB, write_checkpoint
from reference_plans import Feed, make_plan

from pagoda.arch.memory import KvType
from pagoda.arch.registry import load_spec
from pagoda.arch.spec import Rope
from pagoda.backend.base import Limits
from pagoda.backend.reference import ReferenceExecutor, rotate
from pagoda.backend.select import load_executor
from pagoda.errors import ConfigError, EngineError, MemoryShort
from pagoda.types import Float32
from pagoda.weights.open import open_source

LIMITS = Limits(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=128, num_blocks=24)
TOKENS = np.random.default_rng(1).integers(3, VOCAB, 60).tolist()


@pytest.fixture(scope="module", params=["llama", "qwen3-window"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(path, request.param)
    return path


def load(path: Path, kv_type: KvType = "float32") -> ReferenceExecutor:
    source = open_source(str(path))
    return ReferenceExecutor.load(load_spec(source), source, LIMITS, kv_type=kv_type)


def last(tokens: list[int], position: int = 0, blocks: list[int] | None = None) -> Feed:
    """A feed that wants logits after its last token."""
    return Feed(tokens, position, blocks or [0, 1, 2, 3], rows=[(len(tokens) - 1, -1, -1)])


def alone(path: Path, tokens: list[int]) -> Float32:
    return load(path).logits(make_plan([last(tokens)], VOCAB))[0]


@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 59])
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(checkpoint: Path, chunk: int) -> None:
    executor = load(checkpoint)
    for start in range(0, len(TOKENS), chunk):
        logits = executor.logits(make_plan([last(TOKENS[start : start + chunk], start)], VOCAB))
    assert np.array_equal(logits[0], alone(checkpoint, TOKENS))


def test_company_changes_no_bit(checkpoint: Path) -> None:
    """Prompt chunks and single tokens of several requests in one step, slots and blocks out of order."""
    executor = load(checkpoint)
    others = [TOKENS[5:45], TOKENS[20:21] * 30]
    blocks = [[20, 3, 11, 8], [1, 9, 2], [0, 23]]
    feeds = [last(TOKENS[:37], 0, blocks[0]), last(others[0][:39], 0, blocks[1])]
    executor.logits(make_plan(feeds, VOCAB, slots=[2, 0]))
    feeds = [last(others[0][39:], 39, blocks[1]), last(others[1], 0, blocks[2]), last(TOKENS[37:], 37, blocks[0])]
    logits = executor.logits(make_plan(feeds, VOCAB, slots=[0, 3, 2]))
    for row, tokens in zip(logits, [others[0], others[1], TOKENS], strict=True):
        assert np.array_equal(row, alone(checkpoint, tokens))


@pytest.mark.parametrize("same_step", [True, False])
def test_a_shared_prefix_is_read_from_the_blocks_of_another(checkpoint: Path, same_step: bool) -> None:
    """Also while the other one writes it, in the same step."""
    executor = load(checkpoint)
    other = TOKENS[:32] + TOKENS[40:50]
    writer, reader = last(TOKENS, 0, [4, 5, 6, 7]), last(other[32:], 32, [4, 5, 8])
    if same_step:
        logits = executor.logits(make_plan([reader, writer], VOCAB))
        assert np.array_equal(logits[1], alone(checkpoint, TOKENS))
    else:
        executor.logits(make_plan([writer], VOCAB))
        logits = executor.logits(make_plan([reader], VOCAB))
    assert np.array_equal(logits[0], alone(checkpoint, other))


def test_used_blocks_carry_nothing_over(checkpoint: Path) -> None:
    executor = load(checkpoint)
    executor.logits(make_plan([last(TOKENS[::-1])], VOCAB))
    assert np.array_equal(executor.logits(make_plan([last(TOKENS[:20])], VOCAB))[0], alone(checkpoint, TOKENS[:20]))


def test_float16_cache_differs_by_its_rounding_only(checkpoint: Path) -> None:
    rounded = load(checkpoint, "float16")
    logits, exact = rounded.logits(make_plan([last(TOKENS)], VOCAB))[0], alone(checkpoint, TOKENS)
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.02
    assert rounded.capacity.kv_bytes * 2 == load(checkpoint).capacity.kv_bytes


def test_capacity_is_what_was_taken(checkpoint: Path) -> None:
    executor = load(checkpoint)
    assert executor.capacity.num_blocks == 24
    assert executor.capacity.kv_bytes == sum(cache.nbytes for cache in executor.caches)
    assert executor.capacity.weight_bytes == sum(w.nbytes for w in executor.weights.values())


def test_a_nan_stays_with_its_request(checkpoint: Path) -> None:
    executor = load(checkpoint)
    executor.weights = {**executor.weights, "embed": executor.weights["embed"].copy()}
    executor.weights["embed"][7] = np.nan
    feeds = [last([5, 6], 0, [0]), last([5, 7], 0, [1])]
    if executor.spec.tied:
        pytest.fail("the embedding must not be the head here")
    result = executor.launch(make_plan(feeds, VOCAB)).wait()
    assert result.ok.tolist() == [1, 0]


def test_a_plan_that_leaves_the_cache_fails_as_a_step(checkpoint: Path) -> None:
    with pytest.raises(EngineError, match="step failed"):
        load(checkpoint).launch(make_plan([last([5], 0, [24])], VOCAB)).wait()


def test_progress_ends_at_one(checkpoint: Path) -> None:
    seen: list[tuple[str, float]] = []
    source = open_source(str(checkpoint))
    load_executor("reference", load_spec(source), source, LIMITS, lambda phase, share: seen.append((phase, share)))
    shares = [share for _, share in seen]
    assert seen[-1] == ("weights", 1.0) and shares == sorted(shares)


def test_too_large_a_cache_is_refused_before_loading(checkpoint: Path) -> None:
    source = open_source(str(checkpoint))
    limits = Limits(max_model_len=128, max_num_seqs=1, max_num_batched_tokens=128, num_blocks=10**9)
    seen: list[float] = []
    with pytest.raises(MemoryShort, match="KV cache"):
        load_executor("reference", load_spec(source), source, limits, lambda _, share: seen.append(share))
    assert not seen


@pytest.mark.parametrize(("device", "said"), [("cuda", "Use --device cpu"), ("tpu", "auto, cpu, cuda, reference")])
def test_devices_that_are_not_there(checkpoint: Path, device: str, said: str) -> None:
    source = open_source(str(checkpoint))
    with pytest.raises(ConfigError, match=said):
        load_executor(device, load_spec(source), source, LIMITS)


def test_rope_leaves_the_rest_of_a_head_alone() -> None:
    x = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 8)
    for interleaved, pairs in ((False, [(0, 2), (1, 3)]), (True, [(0, 1), (2, 3)])):
        rope = Rope(4, (1.0, 0.5), interleaved=interleaved)
        cos, sin = rope.tables(4)
        out = rotate(x, cos[3:4], sin[3:4], rope)[0, 0]
        for (a, b), angle in zip(pairs, (3.0, 1.5), strict=True):
            turned = complex(x[0, 0, a], x[0, 0, b]) * complex(np.cos(angle), np.sin(angle))
            np.testing.assert_allclose([out[a], out[b]], [turned.real, turned.imag], rtol=1e-6)
        assert out[4:].tolist() == [5, 6, 7, 8]
