"""The cache in 8 bits, and windows: the reference's numbers, the same bits in any company, and the bytes they take."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import VOCAB, write_checkpoint
from reference_plans import Feed, make_plan
from test_native_kernels import ISAS
from test_native_models import relative
from test_native_smollm2 import ENGLISH, answers, ask

from pagoda.arch import memory
from pagoda.arch.memory import KvType
from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.reference import ReferenceExecutor, rounded_to_8_bits
from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.options.formats import KV_EIGHT_BITS
from pagoda.text.tokenizer import Tokenizer, load_tokenizer
from pagoda.types import Request, SamplingParams
from pagoda.weights.open import open_source

pytest.importorskip("torch")
LIMITS = Limits(max_model_len=2048, max_num_seqs=4, max_num_batched_tokens=2048, num_blocks=128)
LONG = np.random.default_rng(0).integers(3, VOCAB, 1300).tolist()


def native_logits(
    path: Path, tokens: list[int], kv: str = "auto", *, chunk: int = 0, threads: int = 2, rows: int = 100
) -> npt.NDArray[np.float32]:
    """Logits after each of the last `rows` tokens, which are fed with the others or in chunks."""
    source = open_source(str(path))
    executor = CpuExecutor.load(load_spec(source), source, replace(LIMITS, kv_cache_dtype=kv, threads=threads))
    size, blocks, out = chunk or len(tokens), range(3, 100), []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        wanted = [(i, -1, -1) for i in range(len(part)) if start + i >= len(tokens) - rows]
        logits = np.zeros((len(wanted), VOCAB), np.float32)
        executor._lib.run(make_plan([Feed(part, start, blocks, wanted)], VOCAB), logits)
        out.append(logits)
    executor.close()
    return np.concatenate(out)


def reference_logits(path: Path, tokens: list[int], kv_type: KvType, rows: int = 100) -> npt.NDArray[np.float32]:
    source = open_source(str(path))
    reference = ReferenceExecutor.load(load_spec(source), source, LIMITS, kv_type=kv_type)
    wanted = [(i, -1, -1) for i in range(len(tokens) - rows, len(tokens))]
    return reference.logits(make_plan([Feed(tokens, blocks=range(90), rows=wanted)], VOCAB))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("case", "head_dim"), [("llama", 16), ("llama", 48), ("llama-one-kv-head", 64), ("qwen3", 32), ("qwen3-window", 32)]
)
def test_eight_bits_are_those_of_the_reference(
    case: str, head_dim: int, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGODA_CPU_ISA", isa)
    write_checkpoint(tmp_path, case, head_dim=head_dim)
    expected = reference_logits(tmp_path, LONG[:100], "int8")
    error = relative(native_logits(tmp_path, LONG[:100], "int8") - expected, expected)
    plain = relative(native_logits(tmp_path, LONG[:100]) - expected, expected)
    # a code that falls to the other side of a half is a whole step off: rare, and later layers amplify it
    assert error < 5e-3 < plain


def test_rounding_to_eight_bits() -> None:
    x = np.random.default_rng(1).standard_normal((3, 2, 80)).astype(np.float32)
    x[0, 0, :32] = 0
    seen = rounded_to_8_bits(x)
    assert not seen[0, 0, :32].any()
    for part in (slice(0, 32), slice(32, 64), slice(64, 80)):
        step = np.abs(x[..., part]).max(axis=-1, keepdims=True) / 127
        assert (np.abs(seen - x)[..., part] <= 0.57 * step).all()
    assert np.isnan(rounded_to_8_bits(np.full((1, 1, 32), np.nan, np.float32))).all()


@pytest.mark.parametrize("kv", ("auto", "int8"))
@pytest.mark.parametrize("window", (17, 600))
def test_windows_over_several_segments(window: int, kv: str, tmp_path: Path) -> None:
    """Chunks, threads and single tokens change no bit; layers without a window are between those with one."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    changes = {"sliding_window": window, "max_position_embeddings": 2048, "layer_types": kinds}
    write_checkpoint(tmp_path, "qwen2-window", **changes)
    whole = native_logits(tmp_path, LONG, kv)
    expected = reference_logits(tmp_path, LONG, "int8" if kv == "int8" else "float16")
    assert relative(whole - expected, expected) < 5e-3
    for chunk, threads in ((100, 1), (512, 3), (17, 2)):
        assert np.array_equal(native_logits(tmp_path, LONG, kv, chunk=chunk, threads=threads), whole)
    one = native_logits(tmp_path, LONG[:700], kv, rows=1)
    assert np.array_equal(native_logits(tmp_path, LONG[:700], kv, chunk=1, rows=1), one)


def test_bytes_are_counted_with_the_scales(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", head_dim=48)
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    assert memory.kv_bytes_per_block(spec, "int8") == 3 * 2 * 2 * 16 * (48 + 2 * 2)
    assert memory.kv_type("auto") == memory.kv_type("float16") == "float16"
    assert {memory.kv_type(asked) for asked in KV_EIGHT_BITS} == {"int8"}
    limits = replace(LIMITS, num_blocks=None, kv_cache_bytes=1 << 20, max_model_len=256)
    taken = {}
    for asked in ("auto", "fp8"):
        executor = CpuExecutor.load(spec, source, replace(limits, kv_cache_dtype=asked))
        taken[asked] = executor.capacity
        executor.close()
    assert taken["fp8"].num_blocks > 1.8 * taken["auto"].num_blocks
    assert (1 << 20) - 10000 < taken["fp8"].kv_bytes <= 1 << 20


def test_a_nan_fails_its_own_request(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llama")
    model.model.embed_tokens.weight.data[7] = math.nan
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    executor = CpuExecutor.load(load_spec(source), source, replace(LIMITS, kv_cache_dtype="int8"))
    feeds = [Feed([5, 6], 0, [0], [(1, -1, -1)]), Feed([7, 6], 0, [1], [(1, -1, -1)])]
    assert executor.launch(make_plan(feeds, VOCAB)).wait().ok.tolist() == [1, 0]
    executor.close()


def test_what_is_used_next_is_taken_from_the_system_before(tmp_path: Path) -> None:
    """24 pages of 2 MiB behind the last that was used, and no more than the cache has."""
    write_checkpoint(tmp_path, "llama", head_dim=32)
    source = open_source(str(tmp_path))
    executor = CpuExecutor.load(load_spec(source), source, replace(LIMITS, num_blocks=20_000))
    block_bytes = executor.capacity.kv_bytes // 20_000

    def pages() -> int:
        return sum(1 for _ in iter(executor.prepare, False))

    def resident_bytes() -> int:
        return int(re.findall(r"^Anonymous: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[0]) << 10

    before = resident_bytes()
    assert pages() == 24
    assert resident_bytes() - before > 40 << 20
    used = (20 << 20) // block_bytes
    assert executor.launch(make_plan([Feed([5, 6], 0, [used - 1], [(1, -1, -1)])], VOCAB)).wait().ok.all()
    assert pages() == 10
    assert executor.launch(make_plan([Feed([5, 6], 0, [19_999], [(1, -1, -1)])], VOCAB)).wait().ok.all()
    assert pages() <= 1
    executor.close()


def config(path: str, **more: object) -> EngineConfig:
    settings = {"model": path, "max_model_len": 2048, "num_blocks": 1024, "kv_cache_dtype": "fp8", **more}
    return EngineConfig(**settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def core(smollm2_path: str) -> Iterator[EngineCore]:
    made = EngineCore(config(smollm2_path))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str, core: EngineCore) -> Tokenizer:
    return load_tokenizer(smollm2_path, core.metadata)


def test_the_same_bits_alone_batched_chunked_cached_and_resumed(
    smollm2_path: str, core: EngineCore, tokenizer: Tokenizer
) -> None:
    requests = ask(tokenizer, 16, 12, 0.9)
    batched = answers(core, requests)
    cached = answers(core, requests)
    assert core.stats().scheduler.prefix_hits_tokens > 0
    assert cached == batched
    assert answers(core, [requests[1]])["1"] == batched["1"]
    tokens, logprobs = batched["5"]
    prompt, params = requests[5].prompt_token_ids, requests[5].params
    resumed = Request(request_id="r", prompt_token_ids=prompt, params=params, output_token_ids=tokens[:7])
    assert answers(core, [resumed])["r"] == (tokens[7:], logprobs[7:])
    for chunk, threads in ((1, 1), (7, 2), (17, 3)):
        settings = {"max_num_batched_tokens": chunk, "max_num_seqs": 1, "prefix_caching": False, "threads": threads}
        small = EngineCore(config(smollm2_path, **settings))
        assert answers(small, [requests[5]])["5"] == batched["5"], chunk
        small.close()


def test_the_file_of_the_weights_takes_no_memory_once_they_are_loaded(smollm2_path: str) -> None:
    source = open_source(smollm2_path)
    before = {name: bytes(tensor.data[:64]) for name, tensor in source.tensors.items()}

    def resident_kib() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        starts = [i for i, line in enumerate(lines) if line.endswith(Path(smollm2_path).name)]
        return sum(int(line.split()[1]) for i in starts for line in lines[i : i + 6] if line.startswith("Rss:"))

    assert resident_kib() > 0
    executor = CpuExecutor.load(load_spec(source), source, replace(LIMITS, num_blocks=None, kv_cache_bytes=64 << 20))
    assert resident_kib() < 8 << 10
    executor.close()
    assert {name: bytes(tensor.data[:64]) for name, tensor in source.tensors.items()} == before


def perplexity(core: EngineCore, ids: list[int]) -> float:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, seed=0)
    core.add(Request(request_id="p", prompt_token_ids=ids, params=params))
    scored = []
    while core.has_work:
        for delta in core.step():
            scored += [entry.logprob for entry in delta.prompt_logprobs or [] if entry is not None]
    return math.exp(-float(np.mean(scored)))


def test_quality_of_a_real_model(smollm2_path: str, core: EngineCore, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ENGLISH)[:1500]
    kept = {}
    for kv in ("float16", "auto"):
        other = EngineCore(config(smollm2_path, kv_cache_dtype=kv))
        kept[kv] = perplexity(other, ids)
        other.close()
    kept["int8"] = perplexity(core, ids)
    print(f"perplexity of {len(ids)} tokens: {kept}")
    assert 0 < abs(kept["int8"] / kept["float16"] - 1) < 0.005
    assert abs(kept["auto"] / kept["float16"] - 1) < 0.01  # bfloat16 where the processor multiplies it


def test_products_of_bfloat16_have_the_same_bits_in_any_company(smollm2_path: str) -> None:
    """Odd lengths too, where the last token's pair has a neighbour that nobody has written."""
    ids = np.random.default_rng(3).integers(3, 40000, 601).tolist()
    alone, chunked = (
        EngineCore(config(smollm2_path, kv_cache_dtype="bfloat16", threads=threads, max_num_batched_tokens=most))
        for threads, most in ((1, 2048), (2, 97))
    )
    for length in (601, 600, 17):
        assert perplexity(alone, ids[:length]) == perplexity(chunked, ids[:length])
    alone.close()
    chunked.close()
