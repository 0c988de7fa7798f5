"""Which files of a repository make the model: one format of weights, and the texts around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from pagoda.deploy.download.hub import Listing, RemoteFile
from pagoda.errors import ModelError
from pagoda.weights.mmproj import preferred

# Tried in this order where a repository has several GGUF files and none was named.
PREFERRED_QUANTS = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_XS", "Q5_K_M", "Q8_0", "Q6_K", "F16", "BF16")
_PYTORCH = "pytorch_model*.bin"
# 1_Pooling/config.json: how sentence-transformers pools an embedding model.
_BELOW = ("[0-9]_*/config.json",)
TEXTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
_SIDECARS = ("mmproj", "mtp-", "imatrix")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)")


def choose(
    listing: Listing, part: str | None = None, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[RemoteFile]:
    """The files to fetch. `part` is a GGUF file or a quantization; patterns are those of a shell."""
    files = list(listing.files)
    if include:
        chosen = [file for file in files if any(fnmatchcase(file.path, pattern) for pattern in include)]
    else:
        top = [file for file in files if "/" not in file.path]
        texts = [file for file in top if any(fnmatchcase(file.path, pattern) for pattern in TEXTS)]
        texts += [file for file in files if any(fnmatchcase(file.path, pattern) for pattern in _BELOW)]
        chosen = texts + _weights(listing, part)
    chosen = [file for file in chosen if not any(fnmatchcase(file.path, pattern) for pattern in exclude)]
    if not chosen:
        raise ModelError(
            f"No file of {listing.repo} is chosen by --include and --exclude",
            remedy=f"It has {', '.join(file.path for file in files[:8])}{' ...' if len(files) > 8 else ''}",
        )
    return chosen


def _weights(listing: Listing, part: str | None) -> list[RemoteFile]:
    top = [file for file in listing.files if "/" not in file.path]
    tensors = [file for file in top if file.path.endswith(".safetensors")]
    if part is None and tensors:
        # Mistral's repositories have all weights twice, under two names.
        usual = [file for file in tensors if not file.path.startswith("consolidated")]
        return usual or tensors
    if part is None and not any(file.path.endswith(".gguf") for file in listing.files):
        pytorch = [file for file in top if fnmatchcase(file.path, _PYTORCH)]
        if pytorch:
            return pytorch
    every = [file.path for file in listing.files]
    paths = pick_gguf(every, part, listing.repo)
    folder = paths[0].rpartition("/")[0]
    eyes = preferred([path for path in every if path.rpartition("/")[0] == folder])
    paths = [*paths, eyes] if eyes is not None else paths
    return [file for file in listing.files if file.path in paths]


def pick_gguf(paths: Sequence[str], part: str | None, model: str) -> list[str]:
    """The one GGUF file that was meant, in all its pieces, the first one first."""
    found = sorted(p for p in paths if p.endswith(".gguf") and not p.rpartition("/")[2].startswith(_SIDECARS))
    if not found:
        raise ModelError(
            f"{model} has no safetensors, no GGUF files and no pytorch_model.bin",
            remedy=f"Choose files yourself: pagoda pull {model} --include '*'",
        )
    whole: dict[str, list[str]] = {}
    for path in found:
        whole.setdefault(_SPLIT.sub("", path), []).append(path)
    if part is None:
        if len(whole) == 1:
            return next(iter(whole.values()))
        names = (name for quant in PREFERRED_QUANTS for name in whole if _is_quant(name, quant))
        best = next(names, None)
    else:
        exact = [name for name in whole if part in (name, *whole[name], name.rpartition("/")[2])]
        best = next(iter(exact or [name for name in whole if _is_quant(name, part)]), None)
    if best is None:
        asked = f"no GGUF file {part}" if part else "several GGUF files"
        shown = [name.rpartition("/")[2] for name in whole]
        raise ModelError(
            f"{model} has {asked}",
            remedy=f"Name one, such as {model}:{shown[0]}; there are {', '.join(shown[:12])}",
        )
    return whole[best]


def _is_quant(name: str, quant: str) -> bool:
    """True if the quantization is a word of its own in the file's name: Q4_K is not Q4_K_M."""
    return bool(re.search(rf"(^|[.\-_/]){re.escape(quant)}([.\-/]|$)", name, re.IGNORECASE))
