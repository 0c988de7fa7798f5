"""`pagoda pack`: a model and all that serves it, in one file for a machine without network and without Python."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from pagoda.cli.findings import take
from pagoda.cli.inputs import load as load_options
from pagoda.cli.inputs import split
from pagoda.cli.model import local_model
from pagoda.cli.screen import ProgressLine, size, table
from pagoda.errors import ConfigError
from pagoda.options.check import check as check_options

HELP = """\
Usage: pagoda pack MODEL [-o FILE] [options] [options of pagoda serve]
       pagoda pack --check FILE

Writes MODEL, this Python, Pagoda and all that it needs into one file. On the other machine it needs nothing but a
shell, tar and coreutils: no network, no Python, no root:

  sh FILE                 install it (sh FILE --help: another folder, check, go back to the version before)

Then the model is asked there what it was asked here; its answer must be the same. Options of pagoda serve are packed
too, but no keys: give those on the other machine.

Examples:
  pagoda pack ./qwen3-0.6b -o qwen3.pagoda --max-model-len 8k
  pagoda pack ./qwen3-32b-awq -o /media/stick/qwen3.pagoda --split 4GiB
  pagoda pack --check qwen3.pagoda

Options:
  -o, --output FILE  the file to write (default: NAME.pagoda)
  --split SIZE       parts FILE.001, FILE.002, ... that are smaller than SIZE; FAT needs 4GiB
  --no-answer        do not start the model here to record its answer; then nothing is compared there
  --no-torch         leave PyTorch out, which only GPUs need
  --check FILE       is this pack whole and sound? Of a split one, name the first part
  --answer FOLDER    ask the model in an unpacked pack, and compare (the installer does that)
"""


def run(words: list[str]) -> int:
    """The command; the result is the exit code."""
    words = ["--output" + word[2:] if word == "-o" or word.startswith("-o=") else word for word in words]
    given, rest = take(words, ("no-answer", "no-torch"), ("output", "split", "check", "answer"))
    if "help" in given:
        print(HELP, end="")
        return 0
    for verb, action in (("check", _check), ("answer", _answer)):
        if verb in given:
            if rest or len(given) > 1:
                raise ConfigError(f"--{verb} takes one name, and nothing else", remedy="See: pagoda pack --help")
            return action(Path(given[verb]).expanduser())
    return _pack(given, rest)


def _check(path: Path) -> int:
    from pagoda.deploy.pack.archive import check
    from pagoda.weights.files import reading

    line = ProgressLine()
    try:
        with reading(path):
            values = check(path, line)
    finally:
        line.clear()
    print(f"{path} is sound: {values['NAME']}, version {values['VERSION']}")
    return 0


def _answer(folder: Path) -> int:
    from pagoda.deploy.pack.answer import compare, judge

    agreement = compare(folder)
    print("no answer was recorded: not compared" if agreement is None else judge(agreement))
    return 0


def _pack(given: dict[str, str], rest: list[str]) -> int:
    from pagoda.deploy.pack.options import plan
    from pagoda.deploy.pack.pack import below, pack
    from pagoda.deploy.plan.machines import parse_memory

    part_bytes = below(parse_memory(given["split"], "--split")) if "split" in given else None
    settings = load_options(split(rest), os.environ)
    check_options(settings)
    for notice in settings.notices:
        print(f"note: {notice}", file=sys.stderr)
    made = replace(
        plan(settings, local_model(settings.options), given.get("output")),
        part_bytes=part_bytes,
        answer="no-answer" not in given,
        torch="no-torch" not in given,
    )
    line = ProgressLine()
    try:
        done = pack(made, line)
    finally:
        line.clear()
    for library, program in done.missing.items():
        print(f"note: {program} asks for {library}, which is not on this machine", file=sys.stderr)
    if settings.options.api_key:
        print("note: the API key is not in the pack: give it again on the other machine", file=sys.stderr)
    engine = (
        f"{size(done.engine_bytes)}, {size(done.torch_bytes)} of it torch"
        if done.torch_bytes
        else size(done.engine_bytes)
    )
    told = "none" if done.answer is None else f"{len(done.answer['token_ids'])} tokens ({done.answer['kernels']})"
    files = f"{done.parts[0].path} to {done.parts[-1].path.suffix}" if len(done.parts) > 1 else str(done.parts[0].path)
    print(f"{files}: {size(sum(part.size for part in done.parts))}, version {done.version}")
    print(table([("model", size(done.model_bytes)), ("Python and packages", engine), ("recorded answer", told),
                 ("needs", f"{done.machine}, glibc {done.glibc}, {size(done.installed_bytes)} of disk"),
                 ("there", f"sh {done.parts[0].path.name}")]))  # fmt: skip
    return 0
