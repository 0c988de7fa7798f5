"""Block types: sizes and values against the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf_quants import encode
from gguf_writer import make_tensor

from pagoda.errors import ModelError
from pagoda.weights.ggml import BLOCKS, dequantize, nbytes
from pagoda.weights.source import Tensor

FLOATS = ("F32", "F16", "BF16")
# Where the float16 numbers of a block are.
SCALES_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
# Root mean square error of a standard normal stored in the type: what its bits allow, and some more.
MAX_ERROR = {
    "F32": 0,
    "F16": 3e-4,
    "BF16": 3e-3,
    "Q4_0": 0.1,
    "Q4_1": 0.09,
    "Q5_0": 0.05,
    "Q5_1": 0.045,
    "Q8_0": 0.006,
    "Q2_K": 0.4,
    "Q3_K": 0.25,
    "Q4_K": 0.1,
    "Q5_K": 0.05,
    "Q6_K": 0.03,
    "IQ4_NL": 0.1,
    "IQ4_XS": 0.1,
    "MXFP4": 0.13,
}


def random_blocks(type: str, count: int) -> npt.NDArray[np.uint8]:
    """Blocks of random bytes whose scales are finite: small, negative, subnormal and zero ones."""
    rng = np.random.default_rng(BLOCKS[type].id)
    blocks = rng.integers(0, 256, (count, BLOCKS[type].bytes), dtype=np.uint8)
    if type == "MXFP4":  # the first byte is an exponent: what is near the largest would run over
        blocks[:, 0] = np.minimum(blocks[:, 0], 250)
    for at in SCALES_AT[type]:
        scales = rng.normal(0, 0.01, count).astype(np.float16)
        scales[::7] *= np.float16(1e-4)
        scales[::11] = 0
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks


@pytest.mark.parametrize("type", SCALES_AT)
def test_values_are_those_of_the_gguf_package(type: str) -> None:
    block = BLOCKS[type]
    rows, per_row = 53, 4  # several chunks of decoding are covered by the test below
    blocks = random_blocks(type, rows * per_row)
    expected = gguf.quants.dequantize(blocks.reshape(rows, -1), gguf.GGMLQuantizationType[type])
    got = dequantize(Tensor("t", (rows, per_row * block.elements), type, blocks.reshape(-1)))
    assert got.dtype == np.float32 and got.shape == (rows, per_row * block.elements)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K", "BF16"])
def test_long_tensors_are_decoded_in_pieces(type: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 1 << 17)).astype(np.float32)
    whole = dequantize(make_tensor("t", values, type))
    rows = [dequantize(make_tensor("t", row, type)) for row in values]
    np.testing.assert_array_equal(whole, np.stack(rows))


@pytest.mark.parametrize("type", FLOATS)
def test_floats_are_exact(type: str) -> None:
    values = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    values[0, :4] = [0.0, -0.0, np.inf, 1e-7]
    data = encode(values, type)
    if type == "BF16":
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.BF16)
    else:
        expected = data.view("<f4" if type == "F32" else "<f2").astype(np.float32)
    np.testing.assert_array_equal(dequantize(Tensor("t", (5, 7), type, data)), expected.reshape(5, 7))


@pytest.mark.parametrize("type", MAX_ERROR)
def test_what_was_stored_comes_back(type: str) -> None:
    values = np.random.default_rng(2).normal(size=(8, 512)).astype(np.float32)
    error = dequantize(make_tensor("t", values, type)) - values
    assert np.sqrt(np.mean(error**2)) <= MAX_ERROR[type]


def test_sizes_are_those_of_the_gguf_package() -> None:
    for theirs, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        if theirs.name in ("Q8_1", "Q8_K"):  # of activations, never in a file
            continue
        ours = BLOCKS[theirs.name]
        assert (ours.id, ours.elements, ours.bytes) == (theirs.value, elements, size)
        assert nbytes(theirs.name, (3, 512)) == 3 * 512 // elements * size
    ids = [block.id for block in BLOCKS.values() if block.id >= 0]
    assert len(ids) == len(set(ids))


def test_sizes_of_odd_shapes() -> None:
    assert nbytes("F32", ()) == 4
    assert nbytes("F16", (0, 5)) == 0
    assert nbytes("Q8_0", (1 << 40, 1 << 30)) == (1 << 70) // 32 * 34
    with pytest.raises(ModelError, match="multiple of 32"):
        nbytes("Q4_0", (32, 33))
    with pytest.raises(ModelError, match="Q9_9"):
        nbytes("Q9_9", (32,))


def test_the_result_belongs_to_the_caller() -> None:
    tensor = make_tensor("t", np.ones(4, np.float32))
    dequantize(tensor)[:] = 5
    np.testing.assert_array_equal(dequantize(tensor), np.ones(4))


@pytest.mark.parametrize("type", ["IQ2_XXS", "NVFP4", "I32", "F8_E4M3"])
def test_types_without_values_are_named(type: str) -> None:
    tensor = Tensor("blk.0.x", (256,), type, np.zeros(nbytes(type, (256,)), np.uint8))
    with pytest.raises(ModelError, match=rf"blk\.0\.x.*{type}"):
        dequantize(tensor)


def test_bytes_must_fit_the_shape() -> None:
    with pytest.raises(ModelError, match="does not fit"):
        dequantize(Tensor("t", (64,), "Q8_0", np.zeros(34, np.uint8)))
