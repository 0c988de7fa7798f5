"""The native executor on tiny random checkpoints of every architecture, against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import CASES, VOCAB, make_model, write_checkpoint, write_gguf_checkpoint
from reference_plans import Feed, make_plan

from pagoda.arch.memory import KvType
from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.reference import ReferenceExecutor
from pagoda.errors import ModelError
from pagoda.weights.open import open_source

torch = pytest.importorskip("torch")
LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128, num_blocks=32)
TOKENS = np.random.default_rng(0).integers(3, VOCAB, 100).tolist()


def native_logits(path: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits after every token of one prompt, [len(tokens), VOCAB]."""
    source = open_source(str(path))
    executor = CpuExecutor.load(load_spec(source), source, LIMITS)
    rows = [(i, -1, -1) for i in range(len(tokens))]
    logits = np.zeros((len(tokens), VOCAB), np.float32)
    executor._lib.run(make_plan([Feed(tokens=tokens, blocks=range(3, 11), rows=rows)], VOCAB), logits)
    executor.close()
    return logits


def expected_logits(model: object, tokens: list[int]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()  # type: ignore[no-any-return, operator]


def reference_logits(path: Path, kv_type: KvType = "float16") -> npt.NDArray[np.float32]:
    source = open_source(str(path))
    reference = ReferenceExecutor.load(load_spec(source), source, LIMITS, kv_type=kv_type)
    rows = [(i, -1, -1) for i in range(len(TOKENS))]
    return reference.logits(make_plan([Feed(tokens=TOKENS, blocks=range(8), rows=rows)], VOCAB))


def relative(error: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Root mean square of the error in terms of that of the logits."""
    return float(np.sqrt((error**2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight *= 0.6  # the usual scale; as they are, these models sharpen every difference
    model.save_pretrained(tmp_path)
    expected = expected_logits(model, TOKENS)
    assert relative(native_logits(tmp_path, TOKENS) - expected, expected) < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_reference_with_keys_and_values_in_16_bits(case: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, case)
    expected = reference_logits(tmp_path)
    assert relative(native_logits(tmp_path, TOKENS) - expected, expected) < 3e-4


@pytest.mark.parametrize("case", ("llama", "qwen2", "qwen3"))
@pytest.mark.parametrize("kind", ("F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"))
def test_gguf_logits_equal_the_reference_on_the_same_weights(case: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf_checkpoint(path, make_model(case), kind)
    expected = reference_logits(path)
    error = relative(native_logits(path, TOKENS) - expected, expected)
    # activations in bf16, where the processor multiplies these: 0.2 %;
    # 8-bit activations: about 0.4 % of noise for each of the 12 products in a row, which these layers amplify
    assert error < {"F32": 3e-4, "F16": 3e-4, "BF16": 0.02}.get(kind, 0.05)


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", head_dim=24)
    with pytest.raises(ModelError, match="head size"):
        native_logits(tmp_path, TOKENS)
