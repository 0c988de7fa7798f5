"""`pagoda convert`: makes safetensors of a PyTorch checkpoint (pytorch_model.bin)."""

from __future__ import annotations

from pathlib import Path

from pagoda.cli.findings import only, take
from pagoda.cli.screen import ProgressLine, size
from pagoda.errors import ConfigError

HELP = """\
Usage: pagoda convert IN OUT

Writes the PyTorch checkpoint IN (a folder with pytorch_model.bin or its shards, or one .bin, .pt or .pth file) as
safetensors into the new folder OUT, with its configuration and tokenizer. No code in the files is run. What was
written is read back and compared byte for byte before OUT appears.

Example:
  pagoda convert ./qwen2.5-1.5b ./qwen2.5-1.5b-safetensors
"""


def run(words: list[str]) -> int:
    given, rest = take(words, ())
    if "help" in given:
        print(HELP, end="")
        return 0
    only(rest, 2, "convert")
    if len(rest) < 2:
        raise ConfigError("pagoda convert needs two names", remedy="Write: pagoda convert FOLDER NEW_FOLDER")
    from pagoda.deploy.check.convert import convert
    from pagoda.weights.files import reading

    source, out = (Path(word).expanduser() for word in rest)
    line = ProgressLine()
    try:
        with reading(source):
            source.stat()
            done = convert(source, out, line)
    finally:
        line.clear()
    files = "1 file" if done.files == 1 else f"{done.files} files"
    print(f"{out}: {done.tensors} tensors, {size(done.total_bytes)} in {files}, read back and equal")
    return 0
