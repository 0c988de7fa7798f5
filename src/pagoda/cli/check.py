"""`pagoda check`: is a model complete, sound and supported?"""

from __future__ import annotations

import os

from pagoda.cli.findings import only, show, take
from pagoda.errors import ConfigError

HELP = """\
Usage: pagoda check MODEL [options]

Says whether MODEL can be served: a folder, a .gguf file, or the hub name of a model that is in a cache here. Files,
shards, headers, tokenizer, chat template, architecture, quantization, permissions. Weights are not read: it takes
less than a second for a model of any size. The exit code is 0, or 1 if something would keep it from being served.

Examples:
  pagoda check ./qwen3-0.6b
  pagoda check ./model.gguf --json
  pagoda check ./qwen3-32b --deep

Options:
  --deep         read every tensor too (NaN, infinity), and hash every file
  --mmproj FILE  the image encoder of a GGUF model, where it does not lie beside it
  --json         the findings for a program
"""


def run(words: list[str]) -> int:
    given, rest = take(words, ("deep", "json"), ("mmproj",))
    if "help" in given:
        print(HELP, end="")
        return 0
    only(rest, 1, "check")
    if not rest:
        raise ConfigError("pagoda check needs a model", remedy="Write: pagoda check FOLDER")
    from pagoda.deploy.check.check import check_model

    findings = check_model(rest[0], os.environ, deep="deep" in given, mmproj=given.get("mmproj"))
    with_it = f" --mmproj {given['mmproj']}" if "mmproj" in given else ""
    verdicts = (f"{rest[0]} can be served: pagoda serve {rest[0]}{with_it}", "{count} found that must be cured first.")
    return show(findings, verdicts, as_json="json" in given, model=rest[0])
