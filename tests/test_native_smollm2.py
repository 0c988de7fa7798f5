"""The native executor on a real model: right against independent implementations, and the same in any company."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.text.tokenizer import Tokenizer, load_tokenizer
from pagoda.types import Request, SamplingParams, TokenLogprob

ENGLISH = (Path(__file__).parent / "data" / "english.txt").read_text()
QUESTIONS = (
    "What is the capital of France?", "Name three primary colors.", "Why is the sky blue?", "Write a haiku about rain.",
    "How many legs does a spider have?", "Who wrote Hamlet?", "Translate 'good morning' to Spanish.",
    "What is 12 times 12?", "Give me a recipe for pancakes.", "What does a compiler do?", "List the planets.",
    "What is photosynthesis?", "Tell me a short story about a fox.", "How do I boil an egg?", "Define gravity.",
    "What is the largest ocean?", "Explain what a database is.", "Who was Marie Curie?", "Why do leaves fall?",
    "Write one sentence about the sea.",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Tokenizer:
    core = EngineCore(EngineConfig(model=smollm2_path, num_blocks=64, max_model_len=1024))
    found = load_tokenizer(smollm2_path, core.metadata)
    core.close()
    return found


def config(path: str, **more: object) -> EngineConfig:
    return EngineConfig(**{"model": path, "max_model_len": 2048, "num_blocks": 1024, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def core(smollm2_path: str) -> Iterator[EngineCore]:
    made = EngineCore(config(smollm2_path))
    yield made
    made.close()


def answers(core: EngineCore, requests: list[Request]) -> dict[str, tuple[list[int], list[TokenLogprob]]]:
    """Tokens and log-probabilities of each request, all submitted at once."""
    out: dict[str, tuple[list[int], list[TokenLogprob]]] = {r.request_id: ([], []) for r in requests}
    for request in requests:
        core.add(request)
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            out[delta.request_id][0].extend(delta.token_ids)
            out[delta.request_id][1].extend(delta.logprobs or [])
    return out


def chat(tokenizer: Tokenizer, question: str) -> list[int]:
    return tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


def ask(tokenizer: Tokenizer, count: int, tokens: int = 24, temperature: float = 0.0) -> list[Request]:
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=chat(tokenizer, QUESTIONS[i % len(QUESTIONS)]),
            params=SamplingParams(temperature=temperature, max_tokens=tokens, logprobs=2, seed=i, ignore_eos=True),
        )
        for i in range(count)
    ]


def test_greedy_text_equals_the_reference_up_to_the_first_near_tie(
    smollm2_path: str, core: EngineCore, tokenizer: Tokenizer
) -> None:
    native = answers(core, ask(tokenizer, 8, 16))
    slow = EngineCore(config(smollm2_path, device="reference", num_blocks=128))
    reference = answers(slow, ask(tokenizer, 8, 16))
    compared = 0
    for name, (tokens, _) in native.items():
        for place, (token, expected) in enumerate(zip(tokens, reference[name][0], strict=True)):
            if token != expected:
                first, second = reference[name][1][place].top
                assert first[1] - second[1] < 0.25, (name, place, first, second)
                break
            compared += 1
    assert compared > 50


def test_perplexity_within_one_percent_of_transformers(
    smollm2_path: str, core: EngineCore, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    ids = tokenizer.encode(ENGLISH)[:700]
    core.add(
        Request(request_id="p", prompt_token_ids=ids, params=SamplingParams(max_tokens=0, prompt_logprobs=0, seed=0))
    )
    scored = []
    while core.has_work:
        for delta in core.step():
            scored += [entry.logprob for entry in delta.prompt_logprobs or [] if entry is not None]
    assert len(scored) == len(ids) - 1
    path = Path(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        expected = torch.log_softmax(logits[:-1].double(), -1).gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    ratio = math.exp(expected - float(np.mean(scored)))
    print(
        f"perplexity: transformers {math.exp(-expected):.3f}, ours {math.exp(-np.mean(scored)):.3f}, ratio {ratio:.4f}"
    )
    assert abs(ratio - 1) < 0.01


@pytest.mark.parametrize("temperature", (0.0, 0.9))
def test_the_same_bits_alone_batched_chunked_and_cached(
    smollm2_path: str, core: EngineCore, tokenizer: Tokenizer, temperature: float
) -> None:
    requests = ask(tokenizer, 32, 12, temperature)
    batched = answers(core, requests)
    cached = answers(core, requests)
    assert core.stats().scheduler.prefix_hits_tokens > 0
    assert cached == batched
    for request in requests[:4]:
        assert answers(core, [request])[request.request_id] == batched[request.request_id]
    for chunk in (1, 3, 7, 16, 17, 33):
        small = EngineCore(config(smollm2_path, max_num_batched_tokens=chunk, max_num_seqs=1, prefix_caching=False))
        assert answers(small, [requests[5]])["5"] == batched["5"], chunk
        small.close()
    for threads in (1, 2, 3):
        other = EngineCore(config(smollm2_path, threads=threads, num_blocks=256))
        assert answers(other, requests[:3])["2"] == batched["2"], threads
        other.close()


def test_a_resumed_request_goes_on_with_the_same_bits(core: EngineCore, tokenizer: Tokenizer) -> None:
    request = ask(tokenizer, 1, 40, 0.8)[0]
    tokens, logprobs = answers(core, [request])["0"]
    for cut in (1, 15, 16, 39):
        again = Request(
            request_id="r",
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            output_token_ids=tokens[:cut],
        )
        assert answers(core, [again])["r"] == (tokens[cut:], logprobs[cut:])


def test_long_context_crosses_segments_with_the_same_bits(smollm2_path: str, tokenizer: Tokenizer) -> None:
    """Beyond 512 tokens attention has several segments, which several threads share out and one takes in turn."""
    ids = tokenizer.encode(ENGLISH)[:700]
    results = []
    for chunk, threads in ((512, 1), (512, 2), (64, 3), (16, 2)):
        engine = EngineCore(config(smollm2_path, max_num_batched_tokens=chunk, max_num_seqs=8, threads=threads))
        params = SamplingParams(temperature=0.7, max_tokens=8, logprobs=3, seed=7)
        results.append(answers(engine, [Request(request_id="l", prompt_token_ids=ids, params=params)]))
        engine.close()
    assert all(result == results[0] for result in results)
