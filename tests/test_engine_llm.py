"""LLM: vLLM's calls on a tiny real model in this process."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import engine_tiny
import msgspec
import pytest

import pagoda
from pagoda import LLM, BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputsParams
from pagoda.engine.beams import BeamSearch
from pagoda.engine.outputs import Logprob
from pagoda.errors import BadRequest, ConfigError, ContextLengthExceeded, ModelError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return engine_tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model=model, device="reference", num_gpu_blocks_override=64, max_num_batched_tokens=64) as made:
        yield made


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_one_prompt_or_many_as_text_or_ids(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    prompts: list[Any] = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}]
    many = llm.generate(prompts, GREEDY)
    assert len(set(texts(many))) == 1 and len(many[0].outputs[0].token_ids) == 12
    assert [one.prompt for one in many] == ["hello", None, "hello", None]
    assert all(one.prompt_token_ids == ids and one.finished for one in many)
    for single in prompts:
        assert texts(llm.generate(single, GREEDY)) == texts(many[:1])
    assert llm.generate([], GREEDY) == []


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"{i} " * (i % 7 + 1) for i in range(30)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + i % 5, logprobs=0) for i in range(30)]
    together = llm.generate(prompts, params)
    assert [one.prompt for one in together] == prompts
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert [one.outputs for one in alone] == [one.outputs for one in together]


def test_logprobs_have_ranks_and_a_sum(llm: LLM) -> None:
    out = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=1))[0]
    answer = out.outputs[0]
    assert answer.logprobs is not None and [len(table) for table in answer.logprobs] == [2, 2, 2]
    chosen = [table[i] for table, i in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert [one.rank for one in chosen] == [1, 1, 1]
    assert answer.cumulative_logprob == pytest.approx(sum(one.logprob for one in chosen))
    assert out.prompt_logprobs is not None and out.prompt_logprobs[0] is None
    given = zip(out.prompt_token_ids, out.prompt_logprobs, strict=True)
    assert [i in (table or {}) for i, table in given] == [False, True, True]
    unlikely = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0)
    table = (llm.generate("abc", unlikely)[0].outputs[0].logprobs or [])[0]
    assert [one.rank for one in table.values()] == [None]


def test_logprobs_of_named_tokens(llm: LLM) -> None:
    """All of them together are certain, and asking for them changes nothing else."""
    ids, plain = range(llm.info.vocab_size), {"temperature": 0.0, "max_tokens": 3, "logprobs": 2}
    parts = [tuple(ids[i : i + 20]) for i in range(0, len(ids), 20)]
    asked = [SamplingParams(**plain, logprob_token_ids=part) for part in parts]
    usual, *named = (
        out.outputs[0] for out in llm.generate(["abc"] * (1 + len(asked)), [SamplingParams(**plain), *asked])
    )
    assert all(one.token_ids == usual.token_ids for one in named) and usual.logprobs is not None
    for place, likeliest in enumerate(usual.logprobs):
        told = {i: one for answer in named for i, one in (answer.logprobs or [])[place].items()}
        assert sum(math.exp(one.logprob) for one in told.values()) == pytest.approx(1, abs=1e-4)
        assert all(told[i].logprob == one.logprob and told[i].rank is None for i, one in likeliest.items())
    with pytest.raises(BadRequest, match="logprob_token_ids takes at most 20"):
        llm.generate("x", SamplingParams(logprob_token_ids=tuple(range(21))))


def test_n_answers_have_seeds_of_their_own(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=10)
    first, again = (llm.generate("x", params)[0] for _ in range(2))
    assert [one.index for one in first.outputs] == [0, 1, 2]
    assert len({one.text for one in first.outputs}) == 3
    assert first.outputs == again.outputs
    assert llm.generate("x", SamplingParams(temperature=1.0, seed=5, max_tokens=10))[0].outputs == first.outputs[:1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_words_do_not_come(llm: LLM, temperature: float) -> None:
    params: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_tokens": 40, "ignore_eos": True}
    plain = llm.generate("abc", SamplingParams(**params))[0].outputs[0]
    first, pair = plain.token_ids[0], tuple(plain.token_ids[7:9])
    runs = {"one token": ((first,),), "a run": (pair,), "no match": ((first, first, first, pair[1]),)}
    made = {
        name: llm.generate("abc", SamplingParams(**params, bad_words_token_ids=ids))[0].outputs[0].token_ids
        for name, ids in runs.items()
    }
    assert first not in made["one token"] and len(made["one token"]) == 40
    assert made["a run"][:8] == plain.token_ids[:8] and pair not in zip(made["a run"], made["a run"][1:], strict=False)
    assert made["no match"] == plain.token_ids
    everything = [SamplingParams(**params, bad_words_token_ids=ids) for ids in runs.values()]
    together = llm.generate(["abc"] * 3, everything)
    assert [one.outputs[0].token_ids for one in together] == list(made.values())


def test_bad_words_are_spelled_with_and_without_a_space(llm: LLM) -> None:
    letters = "abcdefghij klmnop"
    asked = SamplingParams(
        temperature=1.0, seed=1, max_tokens=60, ignore_eos=True, allowed_token_ids=llm.get_tokenizer().encode(letters)
    )
    text = llm.generate("abc", asked)[0].outputs[0].text
    words = [text[i : i + 2] for i in (3, 11, 30) if " " not in text[i : i + 2]]
    given: Any = {**msgspec.structs.asdict(asked), "bad_words": words}  # a list, as vLLM takes it
    clean = llm.generate("abc", SamplingParams(**given))[0].outputs[0].text
    assert len(words) > 1 and all(word in text and word not in clean for word in words)
    for bad in ([""], ["x" * 257], ["x"] * 257):
        with pytest.raises(BadRequest, match="bad_words"):
            llm.generate("abc", SamplingParams(bad_words=tuple(bad)))


def test_stop_strings_as_vllm_takes_them(llm: LLM) -> None:
    free = llm.generate("hello", GREEDY)[0].outputs[0]
    at = next(i for i, c in enumerate(free.text) if i > 0 and c != "�" and c not in free.text[:i])
    for stop in (free.text[at], [free.text[at]]):
        params: Any = {"stop": stop}
        cut = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=12, **params))[0].outputs[0]
        assert (cut.text, cut.finish_reason, cut.stop_reason) == (free.text[:at], "stop", free.text[at])
    assert llm._core.stats().scheduler.blocks_used == 0  # the engine was told
    ids: Any = {"stop_token_ids": [free.token_ids[2]], "stop": None}
    cut = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=12, **ids))[0].outputs[0]
    assert cut.finish_reason == "stop" and cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_chat_one_or_several(llm: LLM) -> None:
    one = [{"role": "user", "content": "hi"}]
    single = llm.chat(one, GREEDY)
    assert single[0].prompt == "user: hi\nassistant:"
    several = llm.chat([one, [*one, {"role": "assistant", "content": "yes"}, one[0]]], GREEDY)
    assert texts(several)[0] == texts(single)[0] and len(several) == 2
    assert llm.chat(one, GREEDY, add_generation_prompt=False)[0].prompt == "user: hi\n"
    assert llm.chat(one, GREEDY, chat_template_kwargs={"prefix": "bot"})[0].prompt == "user: hi\nbot:"
    assert llm.chat(one, GREEDY, chat_template="{{ messages[0]['content'] }}!")[0].prompt == "hi!"


def test_defaults_of_the_model_are_used_without_parameters(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 7, 16)
    assert len(llm.generate("hello")[0].outputs[0].token_ids) <= 16


def test_max_tokens_none_fills_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    out = llm.generate("hello", params)[0]
    assert len(out.prompt_token_ids) + len(out.outputs[0].token_ids) == llm.info.max_model_len
    assert out.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "text"),
    [
        ("x" * 300, {}, ContextLengthExceeded, "300 tokens"),
        ("", {}, BadRequest, "empty"),
        ([5, 100000], {}, BadRequest, "0 to 257"),
        ({"text": "x"}, {}, BadRequest, "prompt_token_ids"),
        ("x", {"temperature": -1.0}, BadRequest, "temperature"),
        ("x", {"temperature": "hot"}, BadRequest, "temperature"),
        ("x", {"stop": [3]}, BadRequest, "stop"),
        (["x", "y"], [SamplingParams()], BadRequest, "2 prompts came with 1"),
    ],
)
def test_what_cannot_be_is_refused_and_the_engine_is_left_as_it_was(
    llm: LLM, prompt: Any, params: Any, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        llm.generate(prompt, params if isinstance(params, list) else SamplingParams(**params))
    assert not llm._core.has_work
    assert len(llm.generate("hello", GREEDY)) == 1


def test_an_interrupt_leaves_a_usable_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, calls = llm._core._executor.launch, []

    def interrupted(plan: Any) -> Any:
        calls.append(plan)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return launch(plan)

    with monkeypatch.context() as patch:
        patch.setattr(llm._core._executor, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello", "world"], GREEDY)
    assert not llm._core.has_work and llm._core.stats().scheduler.blocks_used == 0
    assert len(llm.generate("hello", GREEDY)[0].outputs[0].token_ids) == 12


def test_options_of_vllm(model: str, caplog: pytest.LogCaptureFixture) -> None:
    table = {"trust_remote_code": True, "dtype": "half", "max_num_seqs": 3, "gpu_memory_utilization": 0.8}
    table |= {"tensor_parallel_size": 1, "enforce_eager": True, "max_model_len": 64, "seed": 3}
    with caplog.at_level(logging.WARNING):
        llm = LLM(model, trust_remote_code=True, device="reference", num_gpu_blocks_override=32, vllm_kwargs=table)
    assert (llm.info.max_num_seqs, llm.info.max_model_len) == (3, 64)
    said = [record.message for record in caplog.records]
    assert sum("trust-remote-code" in line for line in said) == 1 and sum("enforce-eager" in line for line in said) == 1
    unseeded = SamplingParams(temperature=1.0, max_tokens=8)
    first = texts(llm.generate(["a", "a"], unseeded))
    again = LLM(model, device="reference", num_gpu_blocks_override=32, seed=3)
    assert texts(again.generate(["a", "a"], unseeded)) == first and first[0] != first[1]


def test_options_that_cannot_be(model: str) -> None:
    with pytest.raises(TypeError, match=r"max_model_length.*max_model_len"):
        LLM(model, max_model_length=5)
    with pytest.raises(ConfigError, match="tensor-parallel-size 2"):
        LLM(model, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="max-model-len 256"):
        LLM(model, device="reference", max_model_len=1000)
    with pytest.raises(ModelError):
        LLM(model + "/nowhere", device="reference")


def test_the_root_exports_lazily() -> None:
    assert pagoda.LLM is LLM and pagoda.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="nothing"):
        pagoda.nothing  # noqa: B018


def test_structured_outputs_as_in_vllm(llm: LLM) -> None:
    kinds = [
        ({"regex": "[a-f]{10}"}, "[a-f]{10}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "a" [bc] "d"'}, "a[bc]d"),
        ({"json": {"enum": [12, "x"]}}, '12|"x"'),
    ]
    params = [
        SamplingParams(max_tokens=20, seed=1, structured_outputs=StructuredOutputsParams(**given)) for given, _ in kinds
    ]
    outputs = llm.generate(["Say it:"] * len(kinds), params)
    for output, (_, pattern) in zip(outputs, kinds, strict=True):
        assert re.fullmatch(pattern, output.outputs[0].text) and output.outputs[0].finish_reason == "stop"
    wrong = StructuredOutputsParams(regex="a", choice=["b"])
    with pytest.raises(BadRequest, match="it may hold one of"):
        llm.generate("Say it:", SamplingParams(structured_outputs=wrong))


def test_beam_search_finds_the_likeliest_answers(llm: LLM) -> None:
    """With one token, and with two by trying all second tokens of all first ones that can be among the best."""
    width = 4
    one = llm.beam_search("abc", BeamSearchParams(beam_width=width, max_tokens=1, ignore_eos=True))[0].sequences
    first = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=1, logprobs=20))[0]
    tops = first.outputs[0].logprobs
    assert tops is not None and [beam.tokens[-1] for beam in one] == list(tops[0])[:width]
    prompt = first.prompt_token_ids
    assert all(beam.tokens[:-1] == prompt and beam.finish_reason == "length" for beam in one)
    assert one[0].text == llm.get_tokenizer().decode(one[0].tokens, skip_special_tokens=True)
    second = llm.generate(
        [[*prompt, beam.tokens[-1]] for beam in one], SamplingParams(temperature=0.0, max_tokens=1, logprobs=2 * width)
    )
    totals: dict[tuple[int, int], float] = {}
    for beam, after in zip(one, second, strict=True):
        assert after.outputs[0].logprobs is not None
        for token, entry in after.outputs[0].logprobs[0].items():
            totals[beam.tokens[-1], token] = beam.cum_logprob + entry.logprob
    best = sorted(totals, key=lambda pair: totals[pair], reverse=True)[:width]
    both = llm.beam_search(["abc", "abc"], BeamSearchParams(beam_width=width, max_tokens=2, ignore_eos=True))
    for found in both:
        assert [tuple(beam.tokens[-2:]) for beam in found.sequences] == best
    with pytest.raises(BadRequest, match="beam width"):
        llm.beam_search("abc", BeamSearchParams(beam_width=11, max_tokens=2))


def test_beams_end_with_the_end_of_the_answer_and_are_judged_by_their_length() -> None:
    def table(**logprobs: float) -> dict[int, Logprob]:
        return {ord(name): Logprob(value, None, name) for name, value in logprobs.items()}

    def found(penalty: float) -> list[tuple[list[int], str | None]]:
        params = BeamSearchParams(beam_width=2, max_tokens=2, length_penalty=penalty)
        search = BeamSearch([1], params, [ord("e")], most=2)
        search.take([table(e=-2.0, a=-1.0, b=-1.5)])
        search.take([table(a=-3.0, e=-9.0), table(a=-1.0, b=-8.0)])
        assert search.live == []
        return [(beam.tokens, beam.finish_reason) for beam in search.best()]

    ended, cut = ([1], "stop"), ([1, ord("b"), ord("a")], "length")
    assert found(0.0) == [ended, cut] and found(1.0) == [cut, ([1, ord("a"), ord("a")], "length")]


def test_the_tokenizer_has_the_names_of_hugging_face(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("hello")
    assert tokenizer("hello") == {"input_ids": ids} and tokenizer(["hello"])["input_ids"] == [ids]
    assert tokenizer.batch_decode([ids, ids[:1]], skip_special_tokens=True)[0] == "hello"
    assert len(tokenizer) == tokenizer.vocab_size and tokenizer.eos_token_id in tokenizer.all_special_ids
    assert len(tokenizer.tokenize("hello")) == len(tokenizer.encode("hello", add_special_tokens=False))
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)  # type: ignore[assignment]
    assert isinstance(text, str) and "hello" in text and ids == llm.chat_prompt(messages).ids


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_as_many_log_probabilities_as_are_allowed(model: str, device: str) -> None:
    with LLM(model=model, device=device, num_gpu_blocks_override=64, threads=1, max_logprobs=100) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=100, prompt_logprobs=100)
        (output,) = llm.generate("hello", params)
        for table in [*(output.outputs[0].logprobs or []), *(output.prompt_logprobs or [])[1:]]:
            assert table is not None
            ranked = sorted((one.rank, one.logprob) for one in table.values() if one.rank is not None)
            assert [rank for rank, _ in ranked] == list(range(1, 101))
            assert [logprob for _, logprob in ranked] == sorted((value for _, value in ranked), reverse=True)
        with pytest.raises(BadRequest, match="between 0 and 100"):
            llm.generate("hello", SamplingParams(logprobs=101))
