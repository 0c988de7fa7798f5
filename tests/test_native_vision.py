"""Vision models natively on the CPU: against the reference executor, and the same bits however a prompt is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_tiny
from reference_plans import Feed, make_plan
from safetensors.torch import load_file, save_file

from pagoda.arch.mrope import rope_positions
from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu import library
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.reference_vision import ReferenceVision
from pagoda.errors import ModelError
from pagoda.types import Float32, Image, PlannedImage, StepPlan
from pagoda.weights.open import open_source

LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=256, num_blocks=40, threads=2)
RNG = np.random.default_rng(5)
TEXT = RNG.integers(7, 263, 200).tolist()
SHAPES = ((1, 4, 10), (4, 6, 4), (1, 12, 2), (1, 14, 22))
"""Frames, and rows and columns of patches."""


def image_of(frames: int, rows: int, columns: int, start: int = 0) -> Image:
    size = (frames, rows * vl_tiny.PATCH, columns * vl_tiny.PATCH, 3)
    return vl_tiny.picture(RNG.integers(0, 256, size, dtype=np.uint8), start, video=frames > 1, second_per_grid=0.7)


@dataclass(frozen=True)
class Prompt:
    tokens: Sequence[int]
    images: Sequence[Image]

    def step(self, spec: Any, first: int, last: int, blocks: Sequence[int]) -> StepPlan:
        """Feeds tokens first:last, and wants the logits of all."""
        feed = Feed(self.tokens[first:last], first, blocks, [(i, -1, -1) for i in range(last - first)])
        positions, _ = rope_positions(len(self.tokens), self.images, spec.vision)
        planned = []
        for image in self.images:
            begin, end = max(image.start, first), min(image.start + image.tokens, last)
            if begin < end:
                planned.append(PlannedImage(image, begin - first, begin - image.start, end - begin))
        turned = np.ascontiguousarray(positions[:, first:last])
        return replace(make_plan([feed], vl_tiny.VOCAB), rope_positions=turned, images=tuple(planned))


def prompt(shapes: Sequence[tuple[int, int, int]] = SHAPES[:3]) -> Prompt:
    """Text, and behind each image some more."""
    tokens, images = TEXT[:5], []
    for i, shape in enumerate(shapes):
        images.append(image_of(*shape, len(tokens)))
        tokens = tokens + [vl_tiny.IMAGE] * images[-1].tokens + TEXT[10 * i : 10 * i + 7]
    return Prompt(tokens, images)


PROMPT = prompt()
BLOCKS = (9, 2, 5, 3, 30, 0, 7, 11, 12, 20)


@pytest.fixture(scope="module", params=vl_tiny.ALL_KINDS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return vl_tiny.write(tmp_path_factory.mktemp(request.param), request.param)


def load(folder: str, **changes: Any) -> CpuExecutor:
    source = open_source(folder)
    return CpuExecutor.load(load_spec(source), source, replace(LIMITS, **changes))


def reference(folder: str) -> ReferenceVision:
    source = open_source(folder)
    made = ReferenceVision.load(load_spec(source), source, LIMITS, kv_type="float16")
    assert isinstance(made, ReferenceVision)
    return made


@pytest.fixture(scope="module")
def native(folder: str) -> Iterator[CpuExecutor]:
    executor = load(folder)
    yield executor
    executor.close()


def logits(executor: CpuExecutor, spec: Any, asked: Prompt, cuts: Sequence[int] = ()) -> Float32:
    """Of every token, the prompt cut into steps."""
    ends = [*cuts, len(asked.tokens)]
    return np.concatenate(
        [run(executor, asked.step(spec, a, b, BLOCKS)) for a, b in zip([0, *cuts], ends, strict=True)]
    )


def run(executor: CpuExecutor, step: StepPlan) -> Float32:
    out = np.zeros((len(step.rows), vl_tiny.VOCAB), np.float32)
    executor.run(step, out)
    return out


def relative(ours: Float32, expected: Float32) -> float:
    return float(np.sqrt(((ours - expected) ** 2).mean() / (expected**2).mean()))


def test_logits_equal_the_reference(folder: str, native: CpuExecutor) -> None:
    expected = reference(folder)
    step = PROMPT.step(expected.spec, 0, len(PROMPT.tokens), BLOCKS)
    theirs = expected.logits(step)
    assert relative(run(native, step), theirs) < 3e-4
    assert native.launch(step).wait().tokens.tolist() == theirs.argmax(axis=1).tolist()
    other = replace(step, images=tuple(replace(p, image=image_of(*_shape(p.image))) for p in step.images))
    assert relative(run(native, other), theirs) > 0.01  # it matters what is in the pictures


def _shape(image: Image) -> tuple[int, int, int]:
    return (image.grid[0] * 2 if image.video else 1, *image.grid[1:])


@pytest.mark.parametrize("cuts", [[1, 6, 7, 30], [10, 11, 25, 26, 27, 50], [41]])
def test_logits_do_not_depend_on_where_the_prompt_is_cut(folder: str, native: CpuExecutor, cuts: list[int]) -> None:
    spec = load_spec(open_source(folder))
    np.testing.assert_array_equal(logits(native, spec, PROMPT, cuts), logits(native, spec, PROMPT))


def test_logits_do_not_depend_on_threads_or_what_is_kept_or_who_else_is_there(folder: str, native: CpuExecutor) -> None:
    spec = load_spec(open_source(folder))
    whole = logits(native, spec, PROMPT)
    other = load(folder, threads=3, max_model_len=len(PROMPT.tokens))
    assert other._vision is not None
    other._vision._encoded._most_bytes = 1  # preempted: what was encoded is gone, and comes again
    np.testing.assert_array_equal(logits(other, spec, PROMPT, [20]), whole)
    np.testing.assert_array_equal(logits(other, spec, PROMPT, [8, 33]), whole)
    other.close()
    mine, theirs = PROMPT.step(spec, 0, len(PROMPT.tokens), BLOCKS), TEXT[:9]
    feeds = [
        Feed(theirs, 0, [31], [(8, -1, -1)]),
        Feed(PROMPT.tokens, 0, BLOCKS, [(i, -1, -1) for i in range(len(whole))]),
    ]
    assert mine.rope_positions is not None
    places = np.broadcast_to(np.arange(9, dtype=np.int32), (3, 9))
    step = replace(
        make_plan(feeds, vl_tiny.VOCAB),
        rope_positions=np.ascontiguousarray(np.concatenate([places, mine.rope_positions], axis=1)),
        images=tuple(replace(p, row=p.row + 9) for p in mine.images),
    )
    together = run(native, step)
    np.testing.assert_array_equal(together[1:], whole)
    alone = run(native, make_plan([Feed(theirs, 0, [31], [(8, -1, -1)])], vl_tiny.VOCAB))
    np.testing.assert_array_equal(together[:1], alone)  # whose rope positions are not even given


@pytest.mark.parametrize("heads", (1, 2))
@pytest.mark.parametrize("isa", library.isas())
def test_vectors_equal_the_reference(isa: str, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 80 and of 160 values, windows that the edges cut, more patches than go through a layer together."""
    monkeypatch.setenv("PAGODA_CPU_ISA", isa)
    vision = {**vl_tiny.config()["vision_config"], "hidden_size": 160, "num_heads": heads, "window_size": 112}
    folder = vl_tiny.write(tmp_path, vision_config=vision)
    native, expected = load(folder, max_model_len=100), reference(folder)
    assert native._vision is not None
    for shape in (*SHAPES, (1, 32, 26)):  # the last is larger than what memory was set aside for
        image = image_of(*shape)
        assert relative(native._vision.encode(image), expected.encoder.encode(image)) < 1e-5
    native.close()


def test_vectors_of_an_encoder_in_bfloat16_equal_the_reference(tmp_path: Path) -> None:
    """Where the processor multiplies bfloat16, what goes into products and into attention is rounded to it."""
    vision = {**vl_tiny.config()["vision_config"], "hidden_size": 160, "num_heads": 2, "window_size": 112}
    folder = vl_tiny.write(tmp_path, vision_config=vision)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    native, expected = load(folder, max_model_len=100), reference(folder)
    assert native._vision is not None
    for shape in (*SHAPES, (1, 18, 30)):
        image = image_of(*shape)
        assert relative(native._vision.encode(image), expected.encoder.encode(image)) < 0.01
    native.close()


def test_an_image_in_parts_has_the_bits_of_one_go(folder: str) -> None:
    executor = load(folder, threads=3)
    assert executor._vision is not None
    image, other = image_of(1, 14, 22), image_of(4, 6, 4)
    whole, parts = executor._vision.encode(image), 0
    assert not executor.encoded(image, 0.0)
    while not executor.encoded(image, 1e-9):
        parts += 1
        if parts == 9:
            assert not executor.encoded(other, 1e-9)  # what was begun begins anew
    assert parts > 20
    np.testing.assert_array_equal(executor._vision._encoded.vectors(image), whole)
    executor.close()


@pytest.mark.parametrize("quantization", ("int8", "int4"))
def test_an_encoder_is_quantized_to_8_bits_on_load(folder: str, quantization: str, native: CpuExecutor) -> None:
    executor, image = load(folder, quantization=quantization), image_of(1, 14, 22)
    assert executor._vision is not None and native._vision is not None
    assert relative(executor._vision.encode(image), native._vision.encode(image)) < 0.05  # of two layers
    assert executor._vision.weight_bytes < 0.35 * native._vision.weight_bytes
    executor.close()


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    vision = {**vl_tiny.config()["vision_config"], "hidden_size": 72, "num_heads": 9, "out_hidden_size": 64}
    with pytest.raises(ModelError, match="no image encoder with 9 heads of 8 values"):
        load(vl_tiny.write(tmp_path, vision_config=vision))
