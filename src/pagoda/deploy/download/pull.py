"""`pagoda pull`: from a model's name to its folder, by one source after the other."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pagoda.deploy.download.choose import choose
from pagoda.deploy.download.failures import DiskFailed, SourceFailed, disk_failed
from pagoda.deploy.download.hub import Listing, RemoteFile, Source, list_files, offline, sources, split_name
from pagoda.deploy.download.layout import Layout, adopt, adopt_complete, hf_folder, layout_for, modelscope_folder
from pagoda.deploy.download.lock import owned
from pagoda.deploy.download.transfer import Pace, Progress, Show, Transfer
from pagoda.errors import ConfigError
from pagoda.weights.mmproj import MARK

_REVISION = re.compile(r"(?!.*\.\.)(?!.*//)[\w][\w./-]*(?<!/)")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to pull, from where, to where. `part`: a GGUF file or a quantization."""

    repo: str
    part: str | None = None
    source: str = "auto"
    revision: str | None = None
    local_dir: Path | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    token_to_mirror: bool = False


@dataclass(frozen=True, slots=True)
class Pulled:
    """Where the model is now, which files were chosen, and how much came over the network for that."""

    folder: Path
    source: str
    files: tuple[str, ...]
    total_bytes: int
    bytes_got: int

    @property
    def model(self) -> Path:
        """What an engine opens: the folder, or the GGUF file where the weights are one."""
        gguf = sorted(path for path in self.files if path.endswith(".gguf") and MARK not in path.lower())
        tensors = any(path.endswith(".safetensors") for path in self.files)
        return self.folder / gguf[0] if gguf and not tensors else self.folder


@dataclass
class Report:
    """How a pull speaks: progress, and lines for people."""

    show: Show = lambda progress: None
    say: Callable[[str], None] = lambda line: None
    pace: Pace = field(default_factory=Pace)


def wanted(name: str) -> Wanted:
    """A hub name with an optional GGUF file or quantization after a colon."""
    split = split_name(name)
    if split is None:
        raise ConfigError(
            f"{name} is not the name of a model", remedy="Names are like Qwen/Qwen3-0.6B, or owner/name:Q4_K_M"
        )
    return Wanted(*split)


def pull(want: Wanted, environ: Mapping[str, str], report: Report) -> Pulled:
    """Fetch the model; what is there already is not fetched again."""
    if want.revision is not None and not _REVISION.fullmatch(want.revision):
        raise ConfigError(f"--revision {want.revision}: that is no branch, tag or commit")
    if offline(environ):
        raise ConfigError(
            f"{want.repo} is not fetched: HF_HUB_OFFLINE forbids the network",
            remedy="Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or name a model that `pagoda list` shows",
        )
    places = sources(want.source, environ, token_to_mirror=want.token_to_mirror)
    failures: list[SourceFailed] = []
    for place, following in zip(places, [*places[1:], None], strict=True):
        try:
            return _pull_from(place, want, environ, report)
        except SourceFailed as error:
            failures.append(error)
            if following is not None:
                report.say(f"{error.message}; trying {following.name}")
    if len(failures) == 1:
        raise failures[0]
    worst = next((error for error in failures if type(error) is SourceFailed), failures[-1])
    raise type(worst)(
        f"No source has given {want.repo}: {'; '.join(error.message for error in failures)}",
        remedy=worst.remedy or "Check the name; a folder or a file is named with its path: ./model",
    )


def _pull_from(source: Source, want: Wanted, environ: Mapping[str, str], report: Report) -> Pulled:
    listing = list_files(source, want.repo, want.revision)
    files = choose(listing, want.part, want.include, want.exclude)
    layout = layout_for(listing, want.local_dir, environ)
    with owned(layout.work / "lock", want.repo):
        progress = Progress(total_bytes=sum(file.size for file in files))
        missing = [file for file in _unlike(files) if not layout.has(file)]
        progress.done_bytes = progress.total_bytes - sum(file.size for file in missing)
        if missing:
            _fetch(listing, missing, layout, want, environ, report, progress)
        folder = layout.publish(listing, files)
    return Pulled(folder, source.name, tuple(f.path for f in files), progress.total_bytes, progress.bytes_got)


def _unlike(files: list[RemoteFile]) -> list[RemoteFile]:
    """Each content once: two threads must not write one partial file."""
    return list({file.etag or f"path {file.path}": file for file in files}.values())


def _fetch(
    listing: Listing,
    missing: list[RemoteFile],
    layout: Layout,
    want: Wanted,
    environ: Mapping[str, str],
    report: Report,
    progress: Progress,
) -> None:
    partials = layout.work / "partial"
    blobs = hf_folder(want.repo, environ)
    scope = modelscope_folder(want.repo, environ)
    left_by_others = [blobs / ".pagoda" / "partial", scope.parent / f".pagoda-{scope.name}" / "partial"]
    adopt(partials, left_by_others, missing)
    adopt_complete(partials, [blobs / "blobs", scope.parent / f".pagoda-{scope.name}" / "verified"], missing)
    _check_space(partials, missing)
    report.say(f"Fetching {want.repo} ({len(missing)} files) from {listing.source.name}")
    Transfer(listing, layout.store, report.pace, progress, report.show).run(missing, partials)
    shutil.rmtree(partials, ignore_errors=True)


def _check_space(folder: Path, missing: list[RemoteFile]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        there = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    except OSError as error:
        raise disk_failed(error, folder) from None
    needed = int(sum(file.size for file in missing) * 1.02) - there
    if needed > free:
        raise DiskFailed(
            f"The model needs {_gib(needed)} more in {folder.parent}, {_gib(free)} are free",
            remedy="Free some space, or name a folder on another disk: --local-dir DIR, or set HF_HOME",
        )


def _gib(count_bytes: int) -> str:
    return f"{count_bytes / 2**30:.1f} GiB" if count_bytes >= 2**30 else f"{count_bytes / 2**20:.1f} MiB"
