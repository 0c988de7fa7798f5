"""Every kernel of the native library, for each instruction set this machine has, against plain numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from gguf_quants import encode

from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.library import Native, isas
from pagoda.backend.cpu.records import BufferShape, Dims, Op
from pagoda.errors import ConfigError
from pagoda.types import StepPlan
from pagoda.weights.ggml import dequantize
from pagoda.weights.source import Tensor

FLOAT = ("F32", "F16", "BF16")
QUANTIZED = tuple(t for t in native.TYPES if t not in FLOAT)


ISAS = isas()[::-1]  # the plain one first, the best last


def stored(rng: np.random.Generator, rows: int, k: int, kind: str) -> Tensor:
    values = (rng.standard_normal((rows, k)) * 0.1).astype(np.float32)
    return Tensor("w", (rows, k), kind, encode(values, kind))


def quantized_rows(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """What the library makes of activations: blocks of 32, code = round(x / d), d = max / 127."""
    blocks = x.reshape(len(x), -1, 32).astype(np.float32)
    top = np.abs(blocks).max(axis=2, keepdims=True)
    inverse = np.where(top > 0, np.float32(127) / np.where(top > 0, top, 1), 0).astype(np.float32)
    codes = np.rint(blocks * inverse)
    return (codes.astype(np.float64) * (top / np.float32(127))).reshape(len(x), -1)


def bf16_rows(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def taken_by(isa: str, kind: str) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]:
    """What products with such weights make of activations."""
    if kind not in FLOAT:
        return quantized_rows
    if kind == "BF16" and isa in ("avx512-bf16", "amx"):
        return bf16_rows
    return lambda x: x.astype(np.float64)


def flat_plan(tokens: int, rows: list[int], vocab: int) -> StepPlan:
    """One request of `tokens` tokens (ids 0, 1, ...) and the given rows of logits."""
    ints, floats, none = (
        (lambda *v: np.array(v, np.int32)),
        (lambda v: np.array([v], np.float32)),
        np.zeros(0, np.int32),
    )
    length = len(rows)
    return StepPlan(
        step=0,
        slots=ints(0), starts=ints(0, tokens), positions=ints(0), tokens=np.arange(tokens, dtype=np.int32),
        block_tables=np.arange(64, dtype=np.int32).reshape(1, 64),
        rows=np.array(rows, np.int32), row_request=np.zeros(length, np.int32),
        row_target=np.full(length, -1, np.int32), row_top=np.full(length, -1, np.int32),
        temperature=floats(0), top_k=ints(0), top_p=floats(1), min_p=floats(0), presence=floats(0), frequency=floats(0),
        repetition=floats(1), seed=np.zeros(1, np.uint64),
        history_start=ints(0, 0), history_ids=none, history_counts=none,
        bias_start=ints(0, 0), bias_ids=none, bias_values=np.zeros(0, np.float32),
        row_mask=np.full(length, -1, np.int32), masks=np.zeros((0, (vocab + 31) // 32), np.uint32),
    )  # fmt: skip


def floats(x: npt.NDArray[np.float32]) -> Tensor:
    return Tensor("x", x.shape, "F32", np.ascontiguousarray(x, np.float32).view(np.uint8).ravel())


def products(
    isa: str, x: npt.NDArray[np.float32], parts: list[Tensor], threads: int = 2, becomes: str = "", at_once: int = 16
) -> npt.NDArray[np.float32]:
    """x [m, k] times the stacked parts, by a program that embeds x and lets the head multiply it."""
    return head_of(isa, floats(x), parts, threads, becomes=becomes, at_once=at_once)


def head_of(
    isa: str,
    embedded: Tensor,
    parts: list[Tensor],
    threads: int = 2,
    *,
    becomes: str = "",
    embedded_becomes: str = "",
    at_once: int = 16,
) -> npt.NDArray[np.float32]:
    """The rows of the embedding times the stacked parts; what float ones become if they are quantized on load."""
    lib = Native(threads, isa)
    m, k = embedded.shape
    embed = lib.weight([(embedded.data, m, k, embedded.type)], [embedded_becomes or embedded.type])
    weight = lib.weight([(t.data, t.shape[0], k, t.type) for t in parts], [becomes or t.type for t in parts])
    columns = sum(t.shape[0] for t in parts)
    inv_freq = np.ones(8)
    dims = Dims(1, 1, 1, 16, max(columns, m), 128, at_once, 64, 16, 0, 1.0, inv_freq.ctypes.data)
    lib.program(
        dims,
        [BufferShape(k, 0), BufferShape(k, 1)],
        [
            Op(native.EMBED, -1, 0, embed, -1, -1, 0, 0, 0),
            Op(native.GATHER, 0, 1, -1, -1, -1, 0, native.LOGIT_ROWS, 0),
            Op(native.HEAD, 1, -1, weight, -1, -1, 0, native.LOGIT_ROWS, 0),
        ],
    )
    logits = np.zeros((m, dims.vocab), np.float32)
    lib.run(flat_plan(m, list(range(m)), dims.vocab), logits)
    lib.close()
    return logits[:, :columns]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", FLOAT + QUANTIZED)
def test_product_is_exact_for_its_own_activations(isa: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    for m, rows, k in ((1, 40, 256), (5, 52, 512), (19, 8, 256)):
        x = rng.standard_normal((m, k)).astype(np.float32)
        w = stored(rng, rows, k, kind)
        seen = products(isa, x, [w])
        taken = taken_by(isa, kind)(x)
        expected = taken @ dequantize(w).astype(np.float64).T
        size = np.abs(taken) @ np.abs(dequantize(w)).T
        assert np.abs(seen - expected).max() <= 2e-6 * size.max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", (2, 53, 90))
def test_bf16_of_any_depth(isa: str, k: int) -> None:
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((13, k)).astype(np.float32), stored(rng, 43, k, "BF16")
    taken = taken_by(isa, "BF16" if k % 2 == 0 else "F32")(x)
    expected = taken @ dequantize(w).astype(np.float64).T
    assert np.abs(products(isa, x, [w]) - expected).max() <= 2e-6 * (np.abs(taken) @ np.abs(dequantize(w)).T).max()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_eight_bit_activations_cost_what_they_must(kind: str) -> None:
    """|error| <= sum over blocks of 32 of (max|x| / 254) * sum|w|: half a step for each activation."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((8, 768)).astype(np.float32)
    w = stored(rng, 64, 768, kind)
    exact = dequantize(w).astype(np.float64)
    error = np.abs(products(ISAS[-1], x, [w]) - x.astype(np.float64) @ exact.T)
    step = np.abs(x.reshape(8, -1, 32)).max(axis=2) / 254
    bound = step @ np.abs(exact).reshape(64, -1, 32).sum(axis=2).T
    assert (error <= bound * 1.001 + 1e-6).all()
    assert np.sqrt((error**2).mean()) < 0.01 * (x @ exact.T).std()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_embedded_rows_are_the_stored_values(isa: str, kind: str) -> None:
    w = stored(np.random.default_rng(6), 20, 256, kind)
    seen = head_of(isa, w, [floats(np.eye(256, dtype=np.float32))])
    values = dequantize(w)
    assert np.abs(seen - values).max() <= 1e-6 * np.abs(values).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ("Q4_1", "Q6_K", "Q8_0", "IQ4_XS", "BF16"))
def test_rows_do_not_depend_on_their_company_or_threads(isa: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((71, 768)).astype(np.float32)
    w = stored(rng, 100, 768, kind)
    together = products(isa, x, [w])  # 16 rows at a time
    for m in (1, 2, 3, 4, 6, 7, 16, 30, 71):
        assert np.array_equal(products(isa, x[:m], [w], threads=1 + m % 3, at_once=128), together[:m])


def test_parts_of_different_types_stack() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((6, 256)).astype(np.float32)
    parts = [stored(rng, rows, 256, kind) for rows, kind in ((24, "Q4_K"), (20, "Q6_K"), (12, "F16"))]
    seen = products(ISAS[-1], x, parts)
    alone = np.concatenate([products(ISAS[-1], x, [part]) for part in parts], axis=1)
    assert np.array_equal(seen, alone)


def test_a_nan_stays_in_its_row() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    x[1, 100] = np.nan
    seen = products(ISAS[-1], x, [stored(rng, 32, 256, "Q4_0")])
    assert np.isnan(seen[1]).all() and np.isfinite(seen[[0, 2]]).all()


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot run 'sse9'"):
        Native(1, "sse9")
