"""GGUF files: what was written is read, and no damage does more than a ModelError."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_writer import make_tensor, write_gguf

from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize
from pagoda.weights.gguf import open_gguf
from pagoda.weights.source import Tensor

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.bool": True,
    "an.int": 7,
    "a.negative": -7,
    "a.big": 1 << 40,
    "a.float": 0.5,
    "a.text": "größer\n",
    "tokens": ["a", "", "Ġthe", "x" * 30],
    "scores": [0.5, -1.25],
    "types": [1, 2, -3],
    "empty": [],
    "nested": [[1, 2], [3]],
}


def values(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    write_gguf(path, METADATA, {"w": (values(3, 64), "Q4_1"), "b": values(5), "x": values(2, 3, 4)})
    return path


def test_reads_what_was_written(small: Path) -> None:
    source = open_gguf(small)
    assert source.metadata == METADATA
    assert source.config == {}
    assert {name: (t.name, t.shape, t.type) for name, t in source.tensors.items()} == {
        "w": ("w", (3, 64), "Q4_1"),
        "b": ("b", (5,), "F32"),
        "x": ("x", (2, 3, 4), "F32"),
    }
    np.testing.assert_array_equal(dequantize(source.tensors["x"]), values(2, 3, 4))
    np.testing.assert_array_equal(source.tensors["w"].data, make_tensor("w", values(3, 64), "Q4_1").data)
    assert not source.tensors["w"].data.flags.writeable
    tensor = source.tensors["b"]
    source.close()
    np.testing.assert_array_equal(dequantize(tensor), values(5))


@pytest.mark.parametrize("code", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "?"])
def test_every_number_type(tmp_path: Path, code: str) -> None:
    array = np.array([0, 1, 100], dtype=code)
    write_gguf(tmp_path / "n.gguf", {"one": array[2], "many": array}, {})
    metadata = open_gguf(tmp_path / "n.gguf").metadata
    assert metadata == {"one": array[2].item(), "many": array.tolist()}
    assert type(metadata["one"]) is type(metadata["many"][0]) is type(array[2].item())


def test_reads_files_of_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "qwen2")
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "ä", ""])
    writer.add_token_scores([0.0, 1.5, -2.0])
    writer.add_rope_freq_base(1e6)
    writer.add_tensor("m", values(4, 32).astype(np.float16))
    q5_0 = gguf.GGMLQuantizationType.Q5_0
    writer.add_tensor("q", gguf.quants.quantize(values(2, 64), q5_0), raw_dtype=q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_gguf(tmp_path / "theirs.gguf")
    assert source.metadata["tokenizer.ggml.tokens"] == ["a", "ä", ""]
    assert source.metadata["tokenizer.ggml.scores"] == [0.0, 1.5, -2.0]
    assert source.metadata["qwen2.rope.freq_base"] == 1e6
    assert (source.tensors["q"].shape, source.tensors["q"].type) == ((2, 64), "Q5_0")
    np.testing.assert_array_equal(dequantize(source.tensors["m"]), values(4, 32).astype(np.float16))
    np.testing.assert_array_equal(source.tensors["q"].data, make_tensor("q", values(2, 64), "Q5_0").data)


def test_text_that_is_not_utf8_is_kept_readable(small: Path) -> None:
    small.write_bytes(small.read_bytes().replace("Ġthe".encode(), b"\xff\xfethe"))
    assert open_gguf(small).metadata["tokens"][2] == "\ufffd\ufffdthe"


def test_version_2_is_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "two.gguf", METADATA, {"b": values(5)}, version=2)
    assert open_gguf(tmp_path / "two.gguf").metadata == METADATA


@pytest.mark.parametrize(("version", "words"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")])
def test_other_versions_are_refused(tmp_path: Path, version: int, words: str) -> None:
    write_gguf(tmp_path / "v.gguf", METADATA, {}, version=version)
    with pytest.raises(ModelError, match=words):
        open_gguf(tmp_path / "v.gguf")


def write_parts(folder: Path, count: int = 3, **changes: Any) -> list[Path]:
    paths = [folder / f"m-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    for i, path in enumerate(paths):
        metadata = {"split.no": i, "split.count": count, "split.tensors.count": count} | changes
        write_gguf(path, {"general.architecture": "llama"} | metadata if i == 0 else metadata, {f"t{i}": values(4)})
    return paths


def test_any_part_opens_the_whole(tmp_path: Path) -> None:
    for path in write_parts(tmp_path):
        source = open_gguf(path)
        assert set(source.tensors) == {"t0", "t1", "t2"}
        assert source.metadata["general.architecture"] == "llama"


def test_parts_must_be_complete_and_true(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    second = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(ModelError, match=r"1 of the 3 parts.*m-00002-of-00003\.gguf"):
        open_gguf(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ModelError, match="not the part its name says"):
        open_gguf(paths[0])
    paths[1].write_bytes(second.replace(b"t1", b"t0"))
    with pytest.raises(ModelError, match="repeats the tensor t0"):
        open_gguf(paths[0])
    write_parts(tmp_path, **{"split.tensors.count": 5})
    with pytest.raises(ModelError, match="3 tensors, not 5"):
        open_gguf(paths[0])
    paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"NAME-00001-of-00003\.gguf"):
        open_gguf(tmp_path / "renamed.gguf")


def header(tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs)


def info(name: bytes = b"t", dims: tuple[int, ...] = (32,), type_id: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", type_id, offset)


def pair(key: bytes, type_id: int, payload: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", type_id) + payload


HUGE = 2**64 - 1
BROKEN = {
    "tensor count": (header(tensors=HUGE), "truncated or damaged"),
    "pair count": (header(pairs=1 << 60), "truncated or damaged"),
    "key length": (header(pairs=1) + struct.pack("<Q", HUGE), "truncated or damaged"),
    "long key": (header(pairs=1) + pair(b"k" * 70000, 0, b"1"), "70000 bytes"),
    "key not text": (header(pairs=1) + pair(b"\xff", 0, b"1"), "not UTF-8"),
    "string length": (header(pairs=1) + pair(b"k", 8, struct.pack("<Q", HUGE)), "truncated or damaged: k"),
    "array count": (header(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 0, HUGE)), "truncated or damaged: k"),
    "array of strings": (header(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 8, 1 << 61)), "truncated or damaged: k"),
    "product overflow": (header(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 10, 1 << 61)), "truncated or damaged: k"),
    "array depth": (header(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 9, 1) * 50), "deeper"),
    "value type": (header(pairs=1) + pair(b"k", 13, b"1234"), "unknown type 13"),
    "key twice": (header(pairs=2) + pair(b"k", 0, b"1") * 2, "k is there twice"),
    "alignment": (header(pairs=1) + pair(b"general.alignment", 4, struct.pack("<I", 48)), "power of two"),
    "no alignment": (header(pairs=1) + pair(b"general.alignment", 4, struct.pack("<I", 0)), "power of two"),
    "alignment text": (header(pairs=1) + pair(b"general.alignment", 8, struct.pack("<Q", 1) + b"8"), "power of two"),
    "tensor twice": (header(tensors=2) + info() * 2 + bytes(999), "t is there twice"),
    "rank": (header(tensors=1) + info(dims=(1, 1, 1, 1, 1)), "5 dimensions"),
    "rank 0": (header(tensors=1) + info(dims=()) + bytes(99), "0 dimensions"),
    "zero": (header(tensors=1) + info(dims=(1 << 62, 0)) + bytes(99), "shape"),
    "shape overflow": (header(tensors=1) + info(dims=(1 << 32, 1 << 32)) + bytes(999), "truncated: the tensor t"),
    "blocks": (header(tensors=1) + info(dims=(33,), type_id=2) + bytes(999), r"Q4_0 but has the shape \(33,\)"),
    "type": (header(tensors=1) + info(type_id=77) + bytes(999), "tensor t has the type 77"),
    "removed type": (header(tensors=1) + info(type_id=4) + bytes(999), "tensor t has the type 4"),
    "offset": (header(tensors=1) + info(offset=HUGE - 31) + bytes(999), "truncated: the tensor t"),
    "odd offset": (header(tensors=1) + info(offset=4) + bytes(999), "multiple of 32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_wrong_field_is_told(tmp_path: Path, case: str) -> None:
    raw, words = BROKEN[case]
    (tmp_path / "bad.gguf").write_bytes(raw + bytes(8))
    with pytest.raises(ModelError, match=words):
        open_gguf(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("type_id", "payload", "words"),
    [
        (9, struct.pack("<IQ", 8, 10_000_000), "10000000 elements"),
        (9, struct.pack("<IQ", 0, 1 << 24), "16777216 elements"),
        (9, struct.pack("<IQ", 12, 1 << 28), "k goes past the 134217728 bytes"),
        (8, struct.pack("<Q", 1 << 32), "k goes past the 134217728 bytes"),
    ],
)
def test_hostile_sizes_are_not_built(tmp_path: Path, type_id: int, payload: bytes, words: str) -> None:
    """A sparse file of gigabytes has room for any count: what a header may hold is capped as well."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(header(pairs=1) + pair(b"k", type_id, payload))
    os.truncate(path, 1 << 33)
    start = time.thread_time()
    with pytest.raises(ModelError, match=words):
        open_gguf(path)
    assert time.thread_time() - start < 1


def open_fully(path: Path) -> list[Tensor]:
    """Open, and read the first and last byte of each tensor, as a wrong offset would show there."""
    tensors = list(open_gguf(path).tensors.values())
    for tensor in tensors:
        assert tensor.nbytes == 0 or int(tensor.data[0]) + int(tensor.data[-1]) >= 0
    return tensors


def test_truncated_anywhere(small: Path) -> None:
    raw = small.read_bytes()
    needed = len(raw) - (-(2 * 3 * 4 * 4) % 32)  # the padding behind the last tensor may be absent
    for length in range(needed):
        small.write_bytes(raw[:length])
        with pytest.raises(ModelError):
            open_fully(small)
    small.write_bytes(raw[:needed])
    assert len(open_fully(small)) == 3


def test_any_flipped_bit_of_the_header(small: Path) -> None:
    raw = bytearray(small.read_bytes())
    refused = 0
    for bit in range(8 * (len(raw) - 256)):
        raw[bit // 8] ^= 1 << bit % 8
        small.write_bytes(raw)
        try:
            open_fully(small)
        except ModelError:
            refused += 1
        raw[bit // 8] ^= 1 << bit % 8
    assert refused > 1000


def test_real_model(smollm2_path: str) -> None:
    start = time.thread_time()
    source = open_gguf(Path(smollm2_path))
    elapsed_ms = 1e3 * (time.thread_time() - start)
    print(f"opened in {elapsed_ms:.0f} ms")
    assert elapsed_ms < 1000
    assert len(source.metadata["tokenizer.ggml.tokens"]) == 49152
    assert source.metadata["tokenizer.ggml.tokens"][:2] == ["<|endoftext|>", "<|im_start|>"]
    assert len(source.tensors) == 272
    assert sum(-(-tensor.nbytes // 32) * 32 for tensor in source.tensors.values()) < os.path.getsize(smollm2_path)
    embedding = source.tensors["token_embd.weight"]
    assert (embedding.shape, embedding.type) == ((49152, 576), "Q8_0")
    assert 0.01 < dequantize(embedding).std() < 1  # at a wrong offset the scales would be noise
