"""Safetensors: the same tensors as the `safetensors` package, and no damage does more than a ModelError."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize
from pagoda.weights.safetensors import INDEX, open_safetensors

TYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I8": "i1",
    "U8": "u1",
    "I16": "i2",
    "I32": "i4",
    "I64": "i8",
    "BOOL": "?",
}


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "limit": [0.0, Infinity]}')
    return tmp_path


def arrays(*names: str) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(3, i + 1)).astype(np.float32) for i, name in enumerate(names)}


def shards(folder: Path, *names: str) -> list[Path]:
    """One shard per tensor, and an index."""
    paths = [folder / f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    for path, (name, array) in zip(paths, arrays(*names).items(), strict=True):
        save_file({name: array}, path)
    index = {"metadata": {"total_size": 1}, "weight_map": {n: p.name for n, p in zip(names, paths, strict=True)}}
    (folder / INDEX).write_text(json.dumps(index))
    return paths


def test_every_type_of_the_package(folder: Path) -> None:
    stored: dict[str, Any] = {name: np.arange(6).reshape(2, 3).astype(code) for name, code in TYPES.items()}
    stored["scalar"], stored["nothing"] = np.array(3, np.float32), np.zeros((0, 4), np.float32)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt", "shape": "text"})
    source = open_safetensors(folder)
    assert source.metadata == {}
    assert source.config["model_type"] == "llama"
    assert set(source.tensors) == set(stored)
    for name, array in stored.items():
        tensor = source.tensors[name]
        assert (tensor.name, tensor.shape, tensor.type) == (name, array.shape, name if name in TYPES else "F32")
        np.testing.assert_array_equal(tensor.data.view(array.dtype).reshape(array.shape), array)
    assert not source.tensors["F32"].data.flags.writeable


def test_bf16_and_f8(folder: Path) -> None:
    data = np.array([1.0, -2.5], np.float32).view(np.uint16)[1::2].tobytes() + b"\x38\xb8"
    header = {"a": entry("BF16", [2], 0, 4), "b": entry("F8_E4M3", [1, 2], 4, 6)}
    source = open_safetensors(write_raw(folder / "model.safetensors", header, data))
    np.testing.assert_array_equal(dequantize(source.tensors["a"]), [1.0, -2.5])
    assert (source.tensors["b"].type, source.tensors["b"].shape) == ("F8_E4M3", (1, 2))
    assert source.tensors["b"].data.tolist() == [0x38, 0xB8]


@pytest.mark.parametrize("by", ["folder", "index"])
def test_shards(folder: Path, by: str) -> None:
    shards(folder, "a", "b", "c")
    source = open_safetensors(folder if by == "folder" else folder / INDEX)
    for name, array in arrays("a", "b", "c").items():
        np.testing.assert_array_equal(dequantize(source.tensors[name]), array)


def test_a_single_file_of_another_name(folder: Path) -> None:
    save_file(arrays("a"), folder / "weights.safetensors")
    assert set(open_safetensors(folder).tensors) == {"a"}
    save_file(arrays("a"), folder / "more.safetensors")
    with pytest.raises(ModelError, match=f"2 safetensors files and no {INDEX}"):
        open_safetensors(folder)
    assert set(open_safetensors(folder / "more.safetensors").tensors) == {"a"}


def test_missing_shards_are_named(folder: Path) -> None:
    paths = shards(folder, "a", "b", "c")
    paths[1].unlink()
    with pytest.raises(ModelError, match=r"1 of the 3 shards.*model-00002-of-00003\.safetensors.*Download them"):
        open_safetensors(folder)
    save_file(arrays("a"), paths[1])
    with pytest.raises(ModelError, match=r"00002.*repeats the tensor a"):
        open_safetensors(folder)
    save_file(arrays("z"), paths[1])
    with pytest.raises(ModelError, match=r"00002.*lacks the tensor b"):
        open_safetensors(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../x.safetensors", "/x.safetensors", "a\0.safetensors", ""])
def test_an_index_names_only_safetensors_beside_it(folder: Path, name: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="no safetensors file beside it"):
        open_safetensors(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 99999])
def test_broken_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match=INDEX):
        open_safetensors(folder)


@pytest.mark.parametrize("text", [None, "", "[]", "{", "\udcff", "[" * 99999, '{"a": ' + "9" * 5000 + "}"])
def test_broken_config(folder: Path, text: str | None) -> None:
    save_file(arrays("a"), folder / "model.safetensors")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json is (missing|not)"):
        open_safetensors(folder)


BROKEN: dict[str, tuple[Any, str]] = {
    "not json": (b"{", "header cannot be read"),
    "deep": (b'{"a":' + b"[" * 99999, "header cannot be read"),
    "not utf-8": (b'{"\xff":{}}', "header cannot be read"),
    "no object": ({"a": 1}, "header cannot be read"),
    "no fields": ({"a": {}}, "tensor a has no shape"),
    "unknown type": ({"a": entry("F7", [1], 0, 4)}, "tensor a has the type 'F7'"),
    "block type": ({"a": entry("Q4_0", [32], 0, 18)}, "tensor a has the type 'Q4_0'"),
    "length": ({"a": entry("F32", [3], 0, 8)}, r"tensor a has 8 bytes, not those of F32 \[3\]"),
    "backwards": ({"a": entry("F32", [1], 4, 0)}, "tensor a has -4 bytes"),
    "negative": ({"a": entry("F32", [-1, -2], 0, 8)}, "header cannot be read"),
    "real": ({"a": entry("F32", [2.5], 0, 8)}, "header cannot be read"),
    "big": ({"a": entry("F32", [2**61, 2**61], 0, 8)}, "tensor a has the shape"),
    "big and empty": ({"a": entry("F32", [2**61, 2**61, 0], 0, 0)}, "tensor a has the shape"),
    "bigger": ({"a": entry("F32", [10**30], 0, 8)}, "header cannot be read"),
    "rank": ({"a": entry("F32", [1] * 9, 0, 4)}, "header cannot be read"),
    "hole": ({"a": entry("F32", [1], 4, 8)}, "tensor a begins at 4, not at 0"),
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, "tensor b begins at 4, not at 8"),
    "past the end": ({"a": entry("F32", [200], 0, 800)}, "truncated: the tensor a"),
    "entries": (b"{" * 140_000, "more than 131072 entries"),
    "tail": ({"a": entry("F32", [1], 0, 4)}, "4 bytes follow"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_wrong_field_is_told(folder: Path, case: str) -> None:
    header, words = BROKEN[case]
    path = write_raw(folder / "model.safetensors", header, bytes(8))
    with pytest.raises(ModelError, match=words) as error:
        open_safetensors(folder)
    assert str(path) in str(error.value)


def test_header_length_is_capped(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 25_000_001) + b"{" * 25_000_001)
    with pytest.raises(ModelError, match="25000001"):
        open_safetensors(folder)


def test_truncated_anywhere_and_any_flipped_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(arrays("a", "b"), path)
    raw = bytearray(path.read_bytes())
    start = time.thread_time()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError):
            open_safetensors(path)
    refused = 0
    header_bits = 8 * (8 + int.from_bytes(raw[:8], "little"))
    for bit in range(header_bits):
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        refused += not opens(path)
        raw[bit // 8] ^= 1 << bit % 8
    assert header_bits // 2 < refused <= header_bits
    assert time.thread_time() - start < 30


def opens(path: Path) -> bool:
    try:
        tensors = open_safetensors(path).tensors.values()
    except ModelError:
        return False
    assert all(tensor.data.sum() >= 0 for tensor in tensors)
    return True


numbers = st.integers(-3, 40) | st.integers()
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F9"]) | st.none(),
        "shape": st.lists(numbers, max_size=4) | st.text(max_size=3),
        "data_offsets": st.lists(numbers, max_size=3) | st.floats(),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=3), entries | st.integers(), max_size=4), tail=st.integers(0, 64))
def test_any_header(folder: Path, header: dict[str, Any], tail: int) -> None:
    opens(write_raw(folder / "model.safetensors", header, bytes(tail)))
