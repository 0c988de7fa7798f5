"""`pagoda check --deep`: reads every tensor (NaN and infinity) and every file (SHA-256, where it is known)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pagoda.deploy.findings import Finding, note, of_error, ok, problem
from pagoda.errors import ModelError
from pagoda.weights.files import DOWNLOAD_AGAIN, sniff
from pagoda.weights.ggml import BLOCKS, dequantize, nbytes
from pagoda.weights.gguf import SPLIT_NAME, open_gguf
from pagoda.weights.pytorch import TRAINING, read_pytorch
from pagoda.weights.safetensors import read_shard
from pagoda.weights.source import Tensor

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 32 << 20
_WHOLE_NUMBERS = re.compile(r"[IU]\d+|BOOL")


def deep_findings(path: Path) -> Iterator[Finding]:
    """For each file with weights: its tensors' values, and its hash."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix not in (".safetensors", ".gguf", ".bin") or file.name in TRAINING or not file.is_file():
            continue
        try:
            tensors = _tensors(file)
        except ModelError:
            continue  # said already
        if tensors:
            yield from _values(file.name, list(tensors.values()))
        yield _hash(file)


def _tensors(file: Path) -> Mapping[str, Tensor]:
    kind, split = sniff(file), SPLIT_NAME.fullmatch(file.name)
    if kind == "gguf":
        return open_gguf(file).tensors if split is None or int(split[2]) == 1 else {}  # the first opens them all
    if kind == "torch":
        return read_pytorch(file)
    return read_shard(file) if kind == "safetensors" else {}


def _values(name: str, tensors: list[Tensor]) -> Iterator[Finding]:
    bad: dict[str, int] = {}
    read = 0
    for tensor in tensors:
        if _WHOLE_NUMBERS.fullmatch(tensor.type):
            continue
        try:
            count = bad_values(tensor)
        except ModelError as error:
            yield of_error("values", error)
            return
        read += 1
        if count:
            bad[tensor.name] = count
    for tensor_name, count in bad.items():
        yield problem("values", f"{name}: {tensor_name} holds {count} NaN or infinite values", DOWNLOAD_AGAIN)
    if not bad:
        yield ok("values", f"{name}: {read} tensors read, no NaN, no infinity")


def bad_values(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    width = tensor.shape[-1] if tensor.shape else 1
    if not tensor.nbytes or not width:
        return 0
    row_bytes = nbytes(tensor.type, (width,))
    elements = BLOCKS[tensor.type].elements
    step = max(1, _CHUNK_BYTES // row_bytes) * row_bytes
    bad = 0
    for begin in range(0, tensor.nbytes, step):
        data = tensor.data[begin : begin + step]
        count = data.nbytes // BLOCKS[tensor.type].bytes * elements
        values = dequantize(Tensor(tensor.name, (count,), tensor.type, data))
        bad += values.size - int(np.count_nonzero(np.isfinite(values)))
    return bad


def _hash(file: Path) -> Finding:
    with file.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    expected = _expected(file)
    if expected is None:
        return note("hash", f"{file.name}: SHA-256 {found}, nothing here to compare it with")
    if expected != found:
        return problem("hash", f"{file.name}: SHA-256 {found}, and the hub says {expected}", DOWNLOAD_AGAIN)
    return ok("hash", f"{file.name}: SHA-256 as the hub says")


def _expected(file: Path) -> str | None:
    """The hash that the download left: the name of a blob in Hugging Face's cache, or its notes in a local folder."""
    if _SHA256.fullmatch(file.resolve().name):
        return file.resolve().name
    notes = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    try:
        lines = notes.read_text().split()
    except (OSError, UnicodeDecodeError):
        return None
    return next((line for line in lines[1:] if _SHA256.fullmatch(line)), None)
