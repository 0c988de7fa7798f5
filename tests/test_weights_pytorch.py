"""pytorch_model.bin: what torch writes is read bit for bit, and no code ever runs, whatever is in a file."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import engine_tiny
import pytest
import torch
import torch_files as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch_files import DATA, GOOD, number, numbers, storage, table, tensor, text

from pagoda.cli.main import main
from pagoda.deploy.check.check import check_model
from pagoda.deploy.check.convert import convert
from pagoda.deploy.download.find_model import is_complete
from pagoda.deploy.findings import problems
from pagoda.errors import ConfigError, ModelError
from pagoda.weights.open import open_source
from pagoda.weights.pytorch import PT_INDEX, read_pytorch
from pagoda.weights.state_dict import OPCODES

TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def content(value: torch.Tensor) -> bytes:
    return bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model whose only weights are in pytorch_model.bin."""
    place = Path(engine_tiny.write(tmp_path / "model"))
    torch.save(OrderedDict(load_file(place / "model.safetensors")), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    return place


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_writes(tmp_path: Path, protocol: int) -> None:
    generator = torch.Generator().manual_seed(3)
    values = {name: torch.randn(4, 6, generator=generator).to(kind) for kind, name in TYPES.items()}
    base = values["F32"]
    values |= {"part": base[1:3], "turned": base.t(), "strided": base[:, ::2], "scalar": torch.tensor(2.5)}
    values |= {"none": torch.zeros(0, 4), "parameter": torch.nn.Parameter(base[0].clone())}
    torch.save(OrderedDict(values), tmp_path / "x.bin", pickle_protocol=protocol)
    found = read_pytorch(tmp_path / "x.bin")
    assert set(found) == set(values)
    for name, value in values.items():
        one = found[name]
        assert (one.name, one.shape, one.type) == (name, tuple(value.shape), TYPES[value.dtype])
        assert one.data.tobytes() == content(value), name
        assert one.nbytes == one.data.nbytes


def test_the_state_of_a_module_with_its_attributes(tmp_path: Path) -> None:
    layer = torch.nn.BatchNorm1d(3)
    torch.save(layer.state_dict(), tmp_path / "x.bin")
    assert set(read_pytorch(tmp_path / "x.bin")) == set(layer.state_dict())


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(16 << 20)}, tmp_path / "x.bin")
    tracemalloc.start()
    one = read_pytorch(tmp_path / "x.bin")["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert one.nbytes == 64 << 20
    assert peak < 4 << 20
    assert not one.data.flags.writeable


def test_shards_by_the_index(folder: Path) -> None:
    values = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    weight_map = {}
    for i, name in enumerate(values):
        weight_map[name] = f"pytorch_model-{i % 2 + 1:05}-of-00002.bin"
    for file in set(weight_map.values()):
        torch.save({name: values[name] for name in values if weight_map[name] == file}, folder / file)
    assert is_complete(folder)
    (folder / PT_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert is_complete(folder)
    for path in (folder, folder / PT_INDEX):
        assert {n: t.data.tobytes() for n, t in open_source(str(path)).tensors.items()} == {
            n: content(v) for n, v in values.items()
        }
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert not is_complete(folder)
    with pytest.raises(ModelError, match=r"1 of the 2 shards.*00002-of-00002\.bin"):
        open_source(str(folder))


def test_a_model_gives_the_answer_of_its_safetensors(folder: Path, tmp_path: Path) -> None:
    from pagoda.engine.llm import LLM
    from pagoda.types import SamplingParams

    twin = engine_tiny.write(tmp_path / "twin")
    answers = []
    for path in (str(folder), twin):
        with LLM(path) as llm:
            answers.append(llm.generate(["hello"], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids)
    assert answers[0] == answers[1]


def test_check_says_what_is_done_with_it(folder: Path) -> None:
    findings = check_model(str(folder), {}, deep=True)
    assert not problems(findings), findings
    said = next(f for f in findings if "pytorch_model.bin" in f.text)
    assert "no code in them is run" in said.text
    assert f"pagoda convert {folder} {folder}-safetensors" in said.cure
    assert any("no NaN" in f.text for f in findings)


# What is refused


class Shell:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Shell()}, "x.bin")
    with pytest.raises(ModelError, match=r"asks for (posix|nt)\.system.*no code is ever run"):
        read_pytorch(Path("x.bin"))
    assert not Path("ran").exists()


@pytest.mark.parametrize("code", [bytes([code]) for code in range(256) if bytes([code]) not in OPCODES])
def test_every_other_opcode_is_refused(tmp_path: Path, code: bytes) -> None:
    with pytest.raises(ModelError, match=f"the opcode 0x{code.hex()} at byte 2 has no place"):
        read_pytorch(made.write(tmp_path / "x.bin", b"\x80\x02" + code + bytes(64)))


def test_the_list_of_opcodes_holds_none_that_makes_objects() -> None:
    dangerous = (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4)
    assert not OPCODES & {*dangerous, pickle.PERSID, pickle.LONG4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER}


NAMES = [
    "builtins\neval", "os\nsystem", "torch\nload", "collections\nOrderedDict.fromkeys", "torch._utils\n_rebuild_tensor",
    "torch\nFloatStorage.__init__", "\n", "collections \nOrderedDict", "numpy.core.multiarray\nscalar",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_other_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is refused"):
        read_pytorch(made.write(tmp_path / "x.bin", table(a=f"c{name}\n".encode() + b")R")))
    module, _, attribute = name.partition("\n")
    with pytest.raises(ModelError, match="is refused"):
        read_pytorch(made.write(tmp_path / "x.bin", table(a=text(module) + text(attribute) + b"\x93)R")))


WHOLE = numbers(2, 3), numbers(3, 1)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends too early"),
    "no end": (GOOD[:-1], "ends too early"),
    "nothing on the stack": (b"\x80\x02.", "more from the stack"),
    "no mark": (b"\x80\x02}u.", "a mark that is not there"),
    "recall": (b"\x80\x02h\x05.", "never stored"),
    "protocol": (b"\x80\x07}.", "protocol 7"),
    "long number": (b"\x80\x02\x8a\xff" + bytes(255) + b".", "a number of 255 bytes"),
    "long text": (b"\x80\x02X\xff\xff\xff\xff", "a text of 4294967295 bytes"),
    "no text": (b"\x80\x02X\x01\0\0\0\xff.", "not UTF-8"),
    "number as key": (b"\x80\x02}K\x01K\x02s.", "a key in it is a int"),
    "deep key": (b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "a key in it is a tuple"),
    "deep value": (table(a=b")" + b"\x85" * 100_000), "is a tuple, not a tensor"),
    "endless": (b"\x80\x02" + b"N" * (1 << 22), "more than 4194304 steps"),
    "itself": (b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "is a dict, not a tensor"),
    "append": (b"\x80\x02}K\x01a.", "appends to a dict"),
    "odd items": (b"\x80\x02}(K\x01u.", "sets items of a dict"),
    "attributes": (b"\x80\x02K\x01}b.", "attributes of a int"),
    "no storage": (table(a=b")Q"), "no storage"),
    "negative storage": (table(a=tensor(*WHOLE, of=storage(elements=-1))), "no storage"),
    "other storage": (table(a=tensor(*WHOLE, of=storage("1"))), "the storage 1 of a is missing"),
    "climbing": (table(a=tensor(*WHOLE, of=storage("../data.pkl"))), "is missing"),
    "more elements": (table(a=tensor(*WHOLE, of=storage(elements=7))), "not of its size"),
    "other type": (table(a=tensor(*WHOLE, of=storage(kind="DoubleStorage"))), "not of its size"),
    "call of a name": (table(a=b"ctorch\nFloatStorage\n)R"), "neither a tensor nor a table"),
    "call of a text": (table(a=text("x") + b")R"), "neither a tensor nor a table"),
    "behind the end": (table(a=tensor(numbers(2, 4), numbers(4, 1))), "ends at 8 of the 6 elements"),
    "far offset": (table(a=tensor(*WHOLE, offset=1)), "ends at 7 of the 6"),
    "negative offset": (table(a=tensor(*WHOLE, offset=-1)), "a shape that cannot be"),
    "negative stride": (table(a=tensor(numbers(2, 3), numbers(-3, 1))), "a shape that cannot be"),
    "negative size": (table(a=tensor(numbers(-2, -3), numbers(3, 1))), "a shape that cannot be"),
    "ranks": (table(a=tensor(numbers(2, 3), numbers(1))), "a shape that cannot be"),
    "rank 9": (table(a=tensor(numbers(*[1] * 9), numbers(*[1] * 9))), "a shape that cannot be"),
    "truth as size": (table(a=tensor(b"(\x88t", numbers(1))), "a shape that cannot be"),
    "bomb of strides": (table(a=tensor(numbers(2**31 - 1, 2**31 - 1), numbers(0, 0))), "larger than its storage"),
    "bomb of zeros": (table(a=tensor(numbers(0, *[2**31 - 1] * 3), numbers(1, 1, 1, 1))), "larger than its storage"),
    "list": (b"\x80\x02].", "holds a list"),
    "number": (b"\x80\x02K\x01.", "holds a int"),
    "number in the table": (table(a=number(1)), "is a int, not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tables(tmp_path: Path, case: str) -> None:
    raw, words = HOSTILE[case]
    path = made.write(tmp_path / "x.bin", raw)
    started = time.perf_counter()
    with pytest.raises(ModelError, match=words) as error:
        read_pytorch(path)
    assert time.perf_counter() - started < 20
    assert str(path) in error.value.message
    assert len(str(error.value)) < 1000


def test_archives_that_torch_never_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    assert read_pytorch(made.write(path))["a"].data.tobytes() == DATA["data/0"]
    for files, words in (({**DATA, "byteorder": b"big"}, "big-endian"), ({}, "is missing")):
        with pytest.raises(ModelError, match=words):
            read_pytorch(made.write(path, files=files))
    with pytest.raises(ModelError, match="compressed"):
        read_pytorch(made.write(path, compressed=True))
    with pytest.raises(ModelError, match=r"no data\.pkl"):
        read_pytorch(made.write(path, files={"extra/data.pkl": b"", **DATA}))
    raw = bytearray(made.write(path).read_bytes())
    end = raw.rfind(b"PK\x05\x06")
    struct.pack_into("<H", raw, end + 10, 60000)
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="cannot hold 60000 files"):
        read_pytorch(path)


def test_truncated_anywhere_and_any_flipped_bit(tmp_path: Path) -> None:
    path = made.write(tmp_path / "x.bin")
    raw = bytearray(path.read_bytes())
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError):
            read_pytorch(path)
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        opens(path)
        raw[bit // 8] ^= 1 << bit % 8


def opens(path: Path) -> bool:
    try:
        tensors = read_pytorch(path).values()
    except ModelError:
        return False
    assert all(one.data.nbytes == one.nbytes <= 24 for one in tensors)
    return True


pieces = st.sampled_from(
    [text("a"), number(2), numbers(2, 3), storage(), tensor(*WHOLE), b"}", b"(", b"t", b"u", b"s", b"q\0", b"h\0", b"R",
     b"Q", b"b", b"]", b"e", b"\x94", b"\x86", b"ctorch\nFloatStorage\n"]
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stream=st.lists(pieces | st.binary(max_size=4), max_size=12))
def test_any_stream(tmp_path: Path, stream: list[bytes]) -> None:
    opens(made.write(tmp_path / "x.bin", b"\x80\x02}" + b"".join(stream) + b"."))


# pagoda convert


@pytest.mark.parametrize("shard_bytes", [10_000_000, 40_000])
def test_convert(folder: Path, tmp_path: Path, shard_bytes: int) -> None:
    out, seen = tmp_path / "new" / "model", []
    done = convert(folder, out, lambda phase, share: seen.append((phase, share)), shard_bytes=shard_bytes)
    before, after = open_source(str(folder)), open_source(str(out))
    assert {n: (t.shape, t.type, t.data.tobytes()) for n, t in before.tensors.items()} == {
        n: (t.shape, t.type, t.data.tobytes()) for n, t in after.tensors.items()
    }
    assert done.tensors == len(before.tensors)
    assert (done.files > 1) == (shard_bytes < 1_000_000)
    assert seen[-1] == ("compare", 1.0)
    assert not problems(check_model(str(out), {}))
    assert {n: content(v) for file in out.glob("*.safetensors") for n, v in load_file(file).items()} == {
        n: t.data.tobytes() for n, t in before.tensors.items()
    }
    assert not list(out.parent.glob(".*"))
    with pytest.raises(ConfigError, match="there already"):
        convert(folder, out, lambda phase, share: None)
    with pytest.raises(ConfigError, match="has safetensors already"):
        convert(out, tmp_path / "third", lambda phase, share: None)


def test_convert_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def stop(phase: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", stop)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert "read back and equal" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "x")]) == 65
    assert main(["convert", "one"]) == 78
