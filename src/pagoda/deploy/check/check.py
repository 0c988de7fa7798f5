"""`pagoda check`: everything that would keep a model from being served, found without reading its weights."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pagoda.arch.memory import size_text
from pagoda.arch.registry import bind, load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.arch.visual import PREPROCESSOR
from pagoda.deploy.check.deep import deep_findings
from pagoda.deploy.check.files import holes, of_pytorch, scan, shards
from pagoda.deploy.download.find_model import find_model
from pagoda.deploy.findings import Finding, note, of_error, ok, problem, problems
from pagoda.errors import ModelError, PagodaError
from pagoda.text.chat import load_chat_template
from pagoda.text.generation import load_generation_defaults
from pagoda.text.tokenizer import load_tokenizer
from pagoda.weights.files import DOWNLOAD_AGAIN, Checkpoint
from pagoda.weights.ggml import dequantize
from pagoda.weights.gguf import SPLIT_NAME
from pagoda.weights.open import open_source
from pagoda.weights.quantization import method_of
from pagoda.weights.source import Tensor, TensorSource

_PROBE = [{"role": "user", "content": "Hello"}]
_FULL_BYTES = 1 << 30


def check_model(
    name: str, environ: Mapping[str, str], *, deep: bool = False, mmproj: str | None = None
) -> list[Finding]:
    """All findings about a folder, a .gguf or .safetensors file, or a hub name that is in a cache here.

    `mmproj` is the image encoder of a GGUF model, None for one that lies beside it.
    """
    try:
        path = Path(find_model(name, environ))
        findings, source = _folder(path, mmproj) if path.is_dir() else _opened(path, mmproj)
    except PagodaError as error:
        return [of_error("path", error)]
    if source is not None:
        findings += _whole(str(path), source)
    if deep:
        findings += [
            found for each in (path, *([] if mmproj is None else [Path(mmproj)])) for found in deep_findings(each)
        ]
    return [*findings, *_disk(path)]


def _folder(folder: Path, mmproj: str | None) -> tuple[list[Finding], TensorSource | None]:
    """The findings about its files, and the checkpoint where it can be opened."""
    seen = scan(folder)
    findings = seen.findings
    if not seen.kinds:
        return [*findings, *([] if findings else [problem("files", f"{folder} is empty", DOWNLOAD_AGAIN)])], None
    if seen.of_kind("gguf", ".gguf") and not seen.of_kind("safetensors", ".safetensors"):
        more, source = _opened(folder, mmproj)
        return findings + more, source
    if of_pytorch(seen) and not problems(findings):
        more, source = _opened(folder, mmproj)
        total = sum(tensor.nbytes for tensor in source.tensors.values()) if source else 0
        done = [ok("weights", f"{len(source.tensors)} tensors, {size_text(total)}")] if source else []
        return [*findings, *more, *done], source
    config, more = _config(folder)
    tensors, of_shards = shards(seen)
    findings += more + of_shards
    if problems(findings) or not tensors:
        if not tensors and not any(f.topic == "weights" for f in findings):
            findings.append(problem("weights", f"{folder} holds no weights", "Download its *.safetensors files"))
        findings += _texts(str(folder), {}, None)
        # Not complete, and yet worth knowing before the rest is downloaded.
        findings += [] if config is None else _architecture(Checkpoint(str(folder), {}, config, tensors))[1]
        return findings, None
    more, source = _opened(folder, mmproj)
    return findings + more, source


def _opened(path: Path, mmproj: str | None) -> tuple[list[Finding], TensorSource | None]:
    try:
        source = open_source(str(path), mmproj)
    except ModelError as error:
        return [of_error("weights", error)], None
    file = Path(source.path)
    if file.is_dir():
        return [], source
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    findings = [finding for part in _parts(file) for finding in holes(part)]
    findings += [] if mmproj is None else holes(Path(mmproj))
    return findings or [ok("weights", f"{file.name}: {len(source.tensors)} tensors, {size_text(total)}")], source


def _parts(file: Path) -> list[Path]:
    split = SPLIT_NAME.fullmatch(file.name)
    return sorted(file.parent.glob(f"{glob.escape(split[1])}-*-of-{split[3]}.gguf")) if split else [file]


def _config(folder: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    path = folder / "config.json"
    if not path.exists():
        return None, [problem("config", f"{path} is missing", "Download the model's config.json")]
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None, [problem("config", f"{path} is not JSON", DOWNLOAD_AGAIN)]
    if not isinstance(config, dict):
        return None, [problem("config", f"{path} is not a JSON object", DOWNLOAD_AGAIN)]
    return config, []


def _whole(path: str, source: TensorSource) -> list[Finding]:
    """What can be said once all files are there: does the model fit together, and can it be served here."""
    spec, findings = _architecture(source)
    if spec is not None:
        findings += _bound(spec, source)
    return [*findings, *_texts(path, source.metadata, spec)]


def _architecture(source: TensorSource) -> tuple[ModelSpec | None, list[Finding]]:
    try:
        spec = load_spec(source)
    except ModelError as error:
        unknown = "not supported" in error.message
        cure = error.remedy or ("Take another model, or a newer Pagoda" if unknown else DOWNLOAD_AGAIN)
        return None, [problem("architecture", error.message, cure)]
    gives = "" if spec.pooling is None else ", gives scores" if spec.pooling.labels else ", makes embeddings"
    findings = [ok("architecture", f"{spec.model_type}, {len(spec.layers)} layers, context {spec.max_position}{gives}")]
    if spec.vision is not None:
        findings += _images(source)
    if source.config.get("auto_map"):
        findings.append(note("architecture", "the folder names Python code of its own (auto_map); it is never run"))
    return spec, findings


def _images(source: TensorSource) -> Iterator[Finding]:
    """A model that sees says beside its weights how large its images may be."""
    if (Path(source.path) / PREPROCESSOR).is_file():
        yield ok("images", "pictures and videos can be given to it")
    else:
        text = f"{PREPROCESSOR} is missing: the sizes of images are those of the model's first version"
        yield note("images", text, f"Download the model's {PREPROCESSOR}")


def _bound(spec: ModelSpec, source: TensorSource) -> list[Finding]:
    try:
        tensors = bind(spec, source)
    except ModelError as error:
        return [of_error("weights", error)]
    kinds = sorted({tensor.type for tensor in tensors.values()})
    try:
        for kind in kinds:
            dequantize(Tensor(f"of type {kind}", (0,), kind, np.empty(0, np.uint8)))
    except ModelError as error:
        return [of_error("quantization", error)]
    method = method_of(source)
    return [ok("quantization", f"{method or 'none'} ({', '.join(kinds)})")]


def _texts(path: str, metadata: Mapping[str, Any], spec: ModelSpec | None) -> Iterator[Finding]:
    """Tokenizer, chat template, generation defaults: each loaded as the server does."""
    try:
        tokenizer = load_tokenizer(path, metadata)
        load_generation_defaults(path, metadata)
    except PagodaError as error:
        yield of_error("tokenizer", error)
        return
    if spec is not None and tokenizer.vocab_size > spec.vocab_size:
        text = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {spec.vocab_size}"
        yield problem("tokenizer", text, "It is another model's: download tokenizer.json and config.json again")
    else:
        yield ok("tokenizer", f"{tokenizer.vocab_size} tokens")
    if spec is not None and spec.pooling is not None:
        return
    if not tokenizer.eos_token_ids and not (spec and spec.eos_token_ids):
        yield note("tokenizer", "no token that ends an answer is named: answers end at max_tokens only")
    try:
        template = load_chat_template(path, metadata)
        if template is not None:
            template.encode(tokenizer, list(_PROBE))
    except PagodaError as error:
        yield of_error("chat template", error)
        return
    if template is None:
        yield note("chat template", "there is none: completions work, chat does not", "Give one: --chat-template FILE")
    else:
        yield ok("chat template", "renders")


def _disk(path: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(path).free
    if free < _FULL_BYTES and os.access(path, os.W_OK):
        yield note("disk", f"{size_text(free)} are free where {path} is", "Make room before anything is downloaded")
    else:
        yield ok("disk", f"{size_text(free)} free")
