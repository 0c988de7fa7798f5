"""The files of a model folder, one by one: can each be read, is it what it should be, is the set complete."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pagoda.arch.memory import size_text
from pagoda.deploy.findings import Finding, note, of_error, ok, problem
from pagoda.errors import ModelError
from pagoda.weights.files import DOWNLOAD_AGAIN, SAVE_AGAIN, Kind, sniff, wrong_kind
from pagoda.weights.pytorch import PT_INDEX, TRAINING
from pagoda.weights.safetensors import INDEX, SINGLE, read_shard
from pagoda.weights.source import Tensor

_LEFTOVERS = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download", ".tmp", ".temp")
_LEFTOVER_FOLDERS = ("._____temp", ".____temp")  # of modelscope
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_SHOWN = 5
_FEW_BYTES = 1 << 20
_MOST_ENTRIES = 10_000


@dataclass(slots=True)
class Files:
    """What was seen in a folder; `kinds` holds only files that can be read."""

    folder: Path
    kinds: dict[str, Kind] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def of_kind(self, kind: Kind, suffix: str = "") -> list[str]:
        return [name for name, found in self.kinds.items() if found == kind and name.endswith(suffix)]


def scan(folder: Path) -> Files:
    """Look at the first bytes of every file: what cannot be read, is no file, or is not what its name says."""
    seen = Files(folder)
    if not os.access(folder, os.R_OK | os.X_OK):
        seen.findings.append(_closed(folder))
        return seen
    for entry in sorted(folder.iterdir())[:_MOST_ENTRIES]:
        if entry.is_dir():
            if entry.name in _LEFTOVER_FOLDERS and any(entry.iterdir()):
                seen.findings.append(_leftover(entry))
        elif finding := _file(seen, entry):
            seen.findings.append(finding)
    seen.findings += _pickles(seen)
    return seen


def _file(seen: Files, file: Path) -> Finding | None:
    if not file.exists():
        if not file.is_symlink():
            return None
        return problem("files", f"{file} is a link to {os.readlink(file)}, which is not there", DOWNLOAD_AGAIN)
    if file.name.endswith(_LEFTOVERS):
        return _leftover(file)
    if not os.access(file, os.R_OK):
        return _closed(file)
    try:
        kind = sniff(file)
    except ModelError as error:
        return of_error("files", error)
    seen.kinds[file.name], seen.sizes[file.name] = kind, file.stat().st_size
    if kind == "pointer":
        return problem("files", f"{file} is a git-lfs pointer{_real_size(file)}, not the file itself", _lfs(file))
    if kind == "empty" and file.name.endswith((".json", ".safetensors", ".gguf", ".jinja", ".model", ".bin")):
        return problem("files", f"{file} is empty", DOWNLOAD_AGAIN)
    wrong = kind == "answer" and file.suffix in (".json", ".safetensors", ".gguf", ".bin", ".model")
    wrong = wrong or (file.suffix in (".safetensors", ".gguf") and kind not in ("gguf", "safetensors", "empty"))
    if wrong and kind == "other":
        return problem("files", f"{file} is damaged: it does not begin as such a file does", DOWNLOAD_AGAIN)
    return of_error("files", wrong_kind(file, kind)) if wrong else None


def _closed(path: Path) -> Finding:
    where = path if path.is_dir() else path.parent
    cure = f"Allow it: sudo chmod -R a+rX {where}"
    return problem("permissions", f"{path} is not readable by this user", cure)


def _leftover(path: Path) -> Finding:
    return problem("files", f"{path} is left from a download that is not finished", "Run the download again")


def _real_size(pointer: Path) -> str:
    match = re.search(rb"^size (\d{1,18})$", pointer.read_bytes()[:1024], re.M)
    return f" for {size_text(int(match[1]))}" if match else ""


def _lfs(file: Path) -> str:
    return f"Run: git -C {file.parent} lfs pull   or download the file"


def _pickles(seen: Files) -> Iterator[Finding]:
    names = [n for n in seen.kinds if n.endswith(_PICKLES) and seen.kinds[n] in ("torch", "pickle", "other")]
    names = [n for n in names if n not in TRAINING]
    if not names:
        return
    what = f"{_some(names)} ({size_text(sum(seen.sizes[n] for n in names))}): PyTorch files"
    if seen.of_kind("safetensors", ".safetensors") or seen.of_kind("gguf", ".gguf"):
        yield note("files", f"{what}; not used, the safetensors or GGUF files are", "They can be deleted")
    elif old := [n for n in names if seen.kinds[n] != "torch"]:
        yield problem("weights", f"{_some(old)}: refused, PyTorch's format from before 1.6, or no model", SAVE_AGAIN)
    else:
        cure = f"Make safetensors of them: pagoda convert {seen.folder} {seen.folder}-safetensors"
        yield note("weights", f"{what}, read through a list of allowed names; no code in them is run", cure)


def of_pytorch(seen: Files) -> bool:
    """True if PyTorch files are all that the folder has of weights, and they can be opened."""
    others = seen.of_kind("safetensors", ".safetensors") or seen.of_kind("gguf", ".gguf") or INDEX in seen.kinds
    return not others and (PT_INDEX in seen.kinds or bool(seen.of_kind("torch", ".bin")))


def shards(seen: Files) -> tuple[dict[str, Tensor], list[Finding]]:
    """The tensors of a safetensors folder as far as they can be read, and all that is wrong with its shards."""
    findings: list[Finding] = []
    promised = _promised(seen, findings)
    tensors: dict[str, Tensor] = {}
    for name, expected in sorted(promised.items()):
        if seen.kinds.get(name) != "safetensors":
            continue  # missing, or said already
        try:
            found = read_shard(seen.folder / name)
        except ModelError as error:
            findings.append(of_error("weights", error))
            continue
        if twice := tensors.keys() & found.keys():
            findings.append(problem("weights", f"{name} repeats {_some(sorted(twice))} of another shard"))
        if lacking := expected - found.keys():
            text = f"{name} lacks {len(lacking)} tensors that {INDEX} promises: {_some(sorted(lacking))}"
            findings.append(problem("weights", text, "Download the shard and the index again"))
        tensors |= found
        findings += holes(seen.folder / name)
    if tensors and not any(f.level == "problem" for f in findings):
        total = sum(tensor.nbytes for tensor in tensors.values())
        files = "1 file" if len(promised) == 1 else f"all {len(promised)} shards"
        findings.append(ok("weights", f"{files}, {len(tensors)} tensors, {size_text(total)}"))
    return tensors, findings


def _promised(seen: Files, findings: list[Finding]) -> Mapping[str, set[str]]:
    """The files that make the checkpoint, each with the tensors that an index says it has."""
    present = seen.of_kind("safetensors", ".safetensors")
    if SINGLE in seen.kinds:
        if INDEX in seen.kinds:
            findings.append(note("weights", f"both {SINGLE} and {INDEX} are there; {SINGLE} is used"))
        return {SINGLE: set()}
    if INDEX in seen.kinds:
        return _indexed(seen, present, findings)
    if not present:
        return {}
    numbered = [match for name in present if (match := _PART.fullmatch(name))]
    if len(present) == 1 and not numbered:
        return {present[0]: set()}
    findings.append(
        problem("weights", f"{INDEX} is missing, which says how the {len(present)} files belong together",
                f"Download {INDEX} into {seen.folder}")
    )  # fmt: skip
    if numbered:
        count = int(numbered[0][3])
        names = [f"{numbered[0][1]}-{i:05}-of-{count:05}.safetensors" for i in range(1, min(count, 10_000) + 1)]
        findings += _missing([name for name in names if name not in seen.kinds], count, seen)
    return {name: set() for name in present}


def _indexed(seen: Files, present: list[str], findings: list[Finding]) -> Mapping[str, set[str]]:
    path = seen.folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        entries = [(str(tensor), str(name)) for tensor, name in index["weight_map"].items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        findings.append(problem("weights", f"{path} is not a safetensors index", DOWNLOAD_AGAIN))
        return {name: set() for name in present}
    promised: dict[str, set[str]] = {}
    for tensor, name in entries:
        promised.setdefault(name, set()).add(tensor)
    findings += _missing([n for n in sorted(promised) if not _there(seen, n)], len(promised), seen, index)
    if extra := sorted(set(present) - promised.keys()):
        findings.append(note("weights", f"{_some(extra)}: not named in {INDEX}, and not used"))
    return promised


def _there(seen: Files, name: str) -> bool:
    """Also true of files that are there and wrong: that was said when the folder was scanned."""
    return os.path.lexists(seen.folder / name) if Path(name).name == name else False


def _missing(names: list[str], count: int, seen: Files, index: object = None) -> Iterator[Finding]:
    if not names:
        return
    text = f"{len(names)} of the {count} shards are missing: {_some(names)}"
    meta = index.get("metadata") if isinstance(index, dict) else None
    total = meta.get("total_size") if isinstance(meta, dict) else None
    if isinstance(total, int | float):
        here = sum(size for name, size in seen.sizes.items() if name.endswith(".safetensors"))
        text += f" (about {size_text(max(0, int(total) - here))})"
    yield problem("weights", text, f"Download them into {seen.folder}")


def holes(file: Path) -> Iterator[Finding]:
    """A file that a downloader made in full length and did not fill has holes, and its header may be fine."""
    missing = _hole_bytes(file)
    if missing > max(_FEW_BYTES, file.stat().st_size // 100):
        text = f"{size_text(missing)} of {file} were never written (the file is sparse): the download is not finished"
        yield problem("weights", text, "Run the download again, or if the model is complete, check its hash")


def _hole_bytes(file: Path) -> int:
    """Bytes of the file that were never written; 0 where the system cannot say."""
    if not hasattr(os, "SEEK_HOLE"):
        return 0
    total = 0
    with file.open("rb") as f:
        size, position = os.fstat(f.fileno()).st_size, 0
        for _ in range(1000):
            try:
                begin = os.lseek(f.fileno(), position, os.SEEK_HOLE)
                if begin >= size:
                    break
                position = _next_data(f.fileno(), begin, size)
            except OSError:
                break
            total += position - begin
    return total


def _next_data(fd: int, begin: int, size: int) -> int:
    try:
        return os.lseek(fd, begin, os.SEEK_DATA)
    except OSError:  # no data behind this hole
        return size


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
