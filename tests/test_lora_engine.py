"""LoRA adapters through the engine: the same tokens alone, in company, in chunks, from the cache and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import VOCAB, make_model, write_checkpoint, write_gguf_checkpoint
from lora_files import write_adapter
from packed_checkpoints import write as write_packed
from reference_plans import Feed, make_plan

from pagoda import LLM, LoRARequest, SamplingParams
from pagoda.arch.lora import read_adapter
from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.reference import ReferenceExecutor
from pagoda.engine.adapters import named_adapters
from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Adapter, Delta, Request, StepPlan
from pagoda.weights.lora import find_adapter
from pagoda.weights.open import open_source

torch = pytest.importorskip("torch")
LIMITS = Limits(max_model_len=256, max_num_seqs=80, max_num_batched_tokens=512, num_blocks=200, max_loras=2)
RNG = np.random.default_rng(0)
PROMPTS = [[int(i) for i in RNG.integers(3, VOCAB, count)] for count in (40, 33, 21, 40, 5, 70)]
WHICH = ["one", "two", None, "one", "two", None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a GGUF file of it in 4 bits, and two adapters."""
    path = tmp_path_factory.mktemp("lora")
    model = write_checkpoint(path / "model", "llama-biases")
    write_gguf_checkpoint(path / "tiny.gguf", make_model("llama"), "Q4_1")
    write_adapter(path / "one", model, rank=5)
    write_adapter(path / "two", model, rank=12, alpha=4, targets=("q_proj", "v_proj", "down_proj"), seed=3)
    return path


def logits(executor: Any, plan: StepPlan) -> npt.NDArray[np.float32]:
    if isinstance(executor, ReferenceExecutor):
        return executor.logits(plan)
    out = np.zeros((len(plan.rows), VOCAB), np.float32)
    executor._lib.run(plan, out)
    return out


def load(kind: Any, path: Path, adapters: Sequence[Path], **limits: Any) -> Any:
    source = open_source(str(path))
    spec = load_spec(source)
    executor = kind.load(spec, source, replace(LIMITS, **limits))
    for place, each in enumerate(adapters):
        gguf = bool(source.metadata)
        executor.adapt(place, read_adapter(find_adapter("a", str(each)), spec, gguf=gguf, max_rank=16))
    return executor


def plan_of(places: Sequence[int], last_only: bool = False) -> StepPlan:
    feeds = []
    for i, prompt in zip(range(len(places)), PROMPTS, strict=False):
        rows = [(row, -1, -1) for row in range(len(prompt))]
        feeds.append(Feed(prompt, blocks=range(6 * i, 6 * i + 6), rows=rows[-1:] if last_only else rows))
    return replace(make_plan(feeds, VOCAB), adapters=np.array(places, np.int32))


@pytest.mark.parametrize("model", ["model", "tiny.gguf"])
def test_the_native_kernels_give_what_the_reference_gives(model: str, folder: Path) -> None:
    """Also where the weights are quantized; rows without an adapter keep their bits."""
    adapters = [folder / "one", folder / "two"]
    found = logits(load(CpuExecutor, folder / model, adapters, threads=2), plan_of([0, 1, -1]))
    exact = logits(load(ReferenceExecutor, folder / model, adapters), plan_of([0, 1, -1]))
    bare = logits(load(ReferenceExecutor, folder / model, []), plan_of([-1, -1, -1]))
    error, noise = np.sqrt(((found - exact) ** 2).mean()), np.sqrt(((exact - bare)[:73] ** 2).mean())
    assert error < (2e-3 if model == "model" else 0.2) * noise
    plain = load(CpuExecutor, folder / model, [], max_loras=0)
    assert np.array_equal(found[73:], logits(plain, replace(plan_of([-1, -1, -1]), adapters=None))[73:])


PACKED = {
    "awq": {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "group_size": 32},
    "gptq": {"quant_method": "gptq", "bits": 8, "desc_act": True, "sym": False, "group_size": 64},
}


@pytest.mark.parametrize("kind", PACKED)
def test_adapters_on_models_in_4_and_8_bits(kind: str, tmp_path: Path) -> None:
    """Also where a product takes its inputs in an order of its own."""
    (tmp_path / "model").mkdir()
    model = write_packed(tmp_path / "model", "llama", PACKED[kind])
    merged = write_adapter(tmp_path / "one", model, rank=8)
    with torch.no_grad():
        exact, bare = (np.asarray(m(torch.tensor([PROMPTS[0]])).logits[0]) for m in (merged, model))
    noise = np.sqrt(((exact - bare) ** 2).mean())
    for backend, bound in ((ReferenceExecutor, 1e-3), (CpuExecutor, 0.1)):
        found = logits(load(backend, tmp_path / "model", [tmp_path / "one"]), plan_of([0]))
        assert np.sqrt(((found - exact) ** 2).mean()) < bound * noise, backend


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_company_threads_and_chains_change_no_bit(threads: int, folder: Path) -> None:
    """Rows of logits alone, where the last layer goes on with them only, and a step that is cut between threads."""
    adapters = [folder / "one", folder / "two"]
    executor = load(CpuExecutor, folder / "model", adapters, threads=threads)
    places = [0, 1, -1, 1, 0, 0]
    together = logits(executor, plan_of(places, last_only=True))
    for i, place in enumerate(places):
        feed = Feed(PROMPTS[i], blocks=range(100, 106), rows=[(len(PROMPTS[i]) - 1, -1, -1)])
        alone = logits(executor, replace(make_plan([feed], VOCAB), adapters=np.array([place], np.int32)))
        assert np.array_equal(alone[0], together[i]), i
    spec = load_spec(open_source(str(folder / "model")))
    executor.adapt(0, read_adapter(find_adapter("a", str(folder / "two")), spec, gguf=False, max_rank=16))
    replaced, other = (logits(executor, plan_of([place], last_only=True)) for place in (0, 1))
    assert np.array_equal(replaced, other)


def adapters_in(folder: Path) -> Mapping[str | None, Adapter | None]:
    return {None: None, **{name: find_adapter(name, str(folder / name)) for name in ("one", "two")}}


def core(folder: Path, **options: Any) -> EngineCore:
    values = {"device": "cpu", "max_model_len": 256, "num_blocks": 64, "max_loras": 2, **options}
    return EngineCore(EngineConfig(model=str(folder / "model"), **values))


def request(folder: Path, number: int, **more: Any) -> Request:
    params = SamplingParams(temperature=0.8 if number % 2 else 0, max_tokens=12, seed=number, ignore_eos=True)
    adapter = adapters_in(folder)[WHICH[number]]
    return Request(
        request_id=str(number), prompt_token_ids=PROMPTS[number], params=params, adapter=adapter, **more
    )  # fmt: skip


def answers(engine: EngineCore, requests: Sequence[Request]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {each.request_id: [] for each in requests}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            out[delta.request_id] += delta.token_ids
    return out


def test_the_same_tokens_alone_together_in_chunks_and_resumed(folder: Path) -> None:
    each = [request(folder, i) for i in range(len(PROMPTS))]
    alone: dict[str, list[int]] = {}
    for one in each:
        alone |= answers(core(folder), [one])
    assert answers(core(folder), each) == alone
    assert answers(core(folder, max_loras=1, max_num_batched_tokens=16, max_num_seqs=3), each) == alone
    half = [msgspec.structs.replace(one, output_token_ids=alone[one.request_id][:5]) for one in each]
    assert answers(core(folder), half) == {name: tokens[5:] for name, tokens in alone.items()}
    different = [msgspec.structs.replace(one, adapter=None) for one in each]
    bare = answers(core(folder), different)
    assert [bare[name] == alone[name] for name in alone] == [which is None for which in WHICH]


def test_the_cache_of_a_prefix_belongs_to_one_adapter(folder: Path) -> None:
    engine = core(folder, max_loras=1)
    adapters = adapters_in(folder)
    cached = []
    tokens: list[list[int]] = []
    for i, which in enumerate(["one", "two", None, "one", "two", None]):
        params = SamplingParams(temperature=0, max_tokens=6, seed=0, ignore_eos=True)
        engine.add(Request(request_id=str(i), prompt_token_ids=PROMPTS[5], params=params, adapter=adapters[which]))
        got: list[Delta] = []
        while engine.has_work:
            got += engine.step()
        cached.append(got[0].cached_tokens)
        tokens.append([token for delta in got for token in delta.token_ids])
    assert cached == [0, 0, 0, 64, 64, 64]
    assert tokens[:3] == tokens[3:] and len({tuple(each) for each in tokens}) == 3


def test_an_adapter_that_is_gone_ends_its_requests_only(folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "gone", make_model("llama-biases"), rank=2)
    adapter = find_adapter("gone", str(tmp_path / "gone"))
    (tmp_path / "gone" / "adapter_model.safetensors").unlink()
    engine = core(folder)
    engine.add(msgspec.structs.replace(request(folder, 0), request_id="gone", adapter=adapter))
    engine.add(request(folder, 1))
    got: list[Delta] = []
    while engine.has_work:
        got += engine.step()
    ends = {delta.request_id: delta for delta in got if delta.finish_reason}
    assert "adapter_model.safetensors" in (ends["gone"].error or "") and ends["1"].error is None
    without = core(folder, max_loras=0)
    without.add(request(folder, 0))
    assert "without LoRA" in (without.step()[0].error or "")


def test_adapters_take_turns_in_the_order_they_came(folder: Path) -> None:
    """With one place a request for another adapter waits; those behind it do not pass it, and those without one do."""
    engine = core(folder, max_loras=1, max_num_seqs=4)
    for i in (0, 1, 2, 3):  # one, two, none, one
        engine.add(request(folder, i))
    ended = []
    while engine.has_work:
        ended += [delta.request_id for delta in engine.step() if delta.finish_reason]
    assert ended.index("1") < ended.index("3") and set(ended[:2]) == {"0", "2"}


def test_llm_takes_loras_as_vllm_does(folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    one, two = (LoRARequest(name, i, str(folder / name)) for i, name in enumerate(("one", "two"), 1))
    prompts = [{"prompt_token_ids": PROMPTS[0]}] * 3
    with LLM(str(folder / "model"), load_format="dummy", enable_lora=True, max_loras=2, max_lora_rank=16) as llm:
        each = [llm.generate(prompts[:1], params, lora_request=which)[0].outputs[0] for which in (one, two, None)]
        mixed = llm.generate(prompts, params, lora_request=[one, two, None])
        assert [out.outputs[0].token_ids for out in mixed] == [out.token_ids for out in each]
        with pytest.raises(ModelError, match="no folder"):
            llm.generate(prompts[:1], params, lora_request=LoRARequest("x", 3, str(folder / "nowhere")))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["one"], "names no adapter"),
        (["one={one}", "one={two}"], "twice"),
        (['{{"name": "one"}}'], "names no adapter"),
        (["one=/nowhere"], "is no folder"),
    ],
)
def test_modules_that_are_written_wrong(words: list[str], error: str, folder: Path) -> None:
    written = [word.format(one=folder / "one", two=folder / "two") for word in words]
    with pytest.raises((ConfigError, ModelError), match=error):
        named_adapters(written)


def test_modules_and_what_does_not_fit_at_start(folder: Path) -> None:
    table = f'{{"name": "two", "path": "{folder / "two"}", "base_model_name": "base"}}'
    adapters, parents = named_adapters([f"one={folder / 'one'}", table])
    assert [each.name for each in adapters] == ["one", "two"] and parents == {"two": "base"}
    with pytest.raises(ModelError, match="--max-lora-rank 12"):
        core(folder, adapters=tuple(adapters), max_lora_rank=8)
    with pytest.raises(ConfigError, match="several GPUs"):
        core(folder, tensor_parallel_size=2, device="torch-cpu")
