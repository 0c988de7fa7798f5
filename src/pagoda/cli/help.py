"""The list of options as text for --help and as the page docs/configuration.md, both from their declaration."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from typing import Any

from pagoda.options.config import declared
from pagoda.options.flags import not_yet, without_effect
from pagoda.options.setting import Setting

SERVE_HELP = """\
Usage: pagoda serve [MODEL ...] [options]

Answers requests for MODEL over the OpenAI API. MODEL is a folder with safetensors, a .gguf file, or a name as on
Hugging Face or ModelScope (owner/name, owner/name:Q4_K_M), which is fetched on first use. Without it the small default
model is served. Of several models the first is loaded at once, each other one when a request names it.

Examples:
  pagoda serve
  pagoda serve ./qwen3-0.6b --port 8001 --max-model-len 8k
  pagoda serve ./qwen3-0.6b --served-model-name qwen --host 0.0.0.0 --api-key "$KEY"
  pagoda serve --config server.yaml --show-config
  pagoda serve ./qwen3-0.6b ./bge-m3 --served-model-name qwen bge
  pagoda serve ./qwen3-0.6b --replicas 2
  pagoda serve ./qwen3-0.6b --upstream http://localhost:11434
"""

_COMMON = """\
  --config FILE           JSON or YAML file with options by their names
  --show-config           print each option, its value and where that is from, and stop
  --help[=WORD]           this text, or the options that have WORD in them

Stronger wins: command line, environment, config file, default. - and _ are alike in names; --no-NAME turns a switch
off; numbers may end in k, m, g (thousands) or K, M, G (1024s). Every option is a variable too: PAGODA_PORT=8001.
"""

PAGE = """\
# Configuration

<!-- Made from src/pagoda/options/config.py: `make docs` writes this page, and a test checks that it is up to date. -->

Every option has four homes; the stronger wins: **command line** > **environment** > **`--config FILE`** > **default**.
`pagoda serve --show-config` prints each value with where it came from (keys are masked).

- On the command line `-` and `_` are alike, and `--no-name` turns a switch off. An option given twice is no error: the
  last one counts, and a line says so.
- In the environment each option is `PAGODA_` and its name in capitals; lists are written with commas. Some have a
  second name, so that setups for vLLM work as they are.
- `--config FILE` is JSON or YAML with the options' names as keys:

  ```yaml
  model: ./qwen3-0.6b
  port: 8001
  max-model-len: 8k
  ```

- Numbers may end in `k`, `m`, `g`, `t` (powers of 1000) or `K`, `M`, `G`, `T` (powers of 1024); `auto` is the default
  where the default is to choose what fits.

## Options of `pagoda serve`
"""

_FOLDERS = """\
## Other variables

| variable | meaning |
|---|---|
| `PAGODA_CONFIG` | the file of `--config` |
| `PAGODA_CACHE` | folder for what Pagoda fetches (default: `$XDG_CACHE_HOME/pagoda` or `~/.cache/pagoda`) |
| `PAGODA_UPSTREAM_API_KEY` | the key that `--upstream` is sent |
| `PAGODA_DEBUG` | `1` prints a traceback with an error |
| `PAGODA_LAUNCH_AHEAD` | `0`: GPU kernels start one after the other, not ahead of the end of the one before |
| `TRITON_CACHE_DIR` | folder of compiled GPU kernels (default: `~/.triton/cache`, else one in `/tmp`) |
| `HF_HOME`, `HF_HUB_CACHE`, `MODELSCOPE_CACHE` | caches in which a hub name is looked up, and kept |
| `HF_ENDPOINT`, `MODELSCOPE_ENDPOINT` | another address of the hub, such as `https://hf-mirror.com` |
| `HF_TOKEN`, `MODELSCOPE_API_TOKEN` | for private and gated models; sent to the hub itself only |
| `HF_HUB_OFFLINE` | `1`: nothing is fetched |
| `VLLM_USE_MODELSCOPE` | `1`: ModelScope is asked first |
| `HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE` | the way to the hubs |

## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 65 | the model's files are missing, broken or not supported |
| 69 | no hub could be reached |
| 70 | an error inside Pagoda |
| 74 | the disk is full, or cannot be written |
| 75 | it does not fit in memory; the message says what would |
| 77 | the address cannot be used: no permission, or it is not one of this machine; or a hub refuses the model |
| 78 | an option, variable or config file is wrong |
| 98 | the port is taken; the message says by whom, as far as the system tells |
| 130 | stopped with Ctrl-C |
"""


def serve_help(word: str = "") -> str:
    """The text of `pagoda serve --help`."""
    wanted = "" if word == "all" else word.replace("-", "_").lower()
    chosen = [s for s in declared() if wanted in s.name or wanted in s.group.lower()]
    parts = [] if wanted else [SERVE_HELP]
    for group in dict.fromkeys(s.group for s in chosen):
        lines = [f"{group}:"]
        for setting in (s for s in chosen if s.group == group):
            lines += _entry(setting)
        parts.append("\n".join(lines) + "\n")
    if not wanted:
        names = ", ".join(s.flag for s in without_effect())
        accepted = textwrap.fill(f"Accepted, without effect here: {names}", 116, break_on_hyphens=False)
        parts += [f"Help:\n{_COMMON}", accepted + "\n"]
    return "\n".join(parts) if parts else f"No option has {word} in its name. All of them: pagoda serve --help\n"


def _entry(setting: Setting) -> list[str]:
    head = ", ".join((setting.flag, *setting.aliases)) + _argument(setting)
    text = f"{setting.help}{_default(setting)}"
    lines = textwrap.wrap(text, 90, initial_indent=" " * 26, subsequent_indent=" " * 26, break_on_hyphens=False)
    if len(head) < 23:
        return [f"  {head:<23} {lines[0].strip()}", *lines[1:]]
    return [f"  {head}", *lines]


def _argument(setting: Setting) -> str:
    if setting.kind == "bool":
        return ""
    if setting.choices:
        return " {" + ",".join(setting.choices) + "}"
    names = {"int": "N", "float": "X", "tuple[str, ...]": "A [B ...]", "Mapping[str, Any]": "JSON"}
    return " " + names.get(setting.kind, "VALUE")


def _default(setting: Setting) -> str:
    shown = _plain(setting.default)
    return f" (default {shown})" if shown else ""


def _plain(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default in (None, (), {}, "") else f"{default:g}" if isinstance(default, float) else str(default)


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [PAGE]
    settings = declared()
    for group in dict.fromkeys(s.group for s in settings):
        parts.append(f"### {group}\n\n| option | default | environment | meaning |\n|---|---|---|---|")
        parts += [_row(s) for s in settings if s.group == group]
        parts.append("")
    parts += ["## vLLM's options without effect here\n", "Accepted, so that commands written for vLLM work.", ""]
    parts += ["| option | what it means here |", "|---|---|", *_pairs(without_effect()), ""]
    parts += ["## vLLM's options that are refused for now\n", "Any value but the default stops the start.", ""]
    parts += ["| option | why |", "|---|---|", *_pairs(not_yet()), "", _FOLDERS]
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    names = ", ".join(f"`{name}`" for name in (setting.flag, *setting.aliases))
    choices = f" One of {', '.join(f'`{c}`' for c in setting.choices)}." if setting.choices else ""
    default = _plain(setting.default)
    env = ", ".join(f"`{v}`" for v in setting.env)
    return f"| {names} | {f'`{default}`' if default else ''} | {env} | {setting.help}.{choices} |"


def _pairs(settings: Iterable[Setting]) -> list[str]:
    return [f"| `{s.flag}` | {s.help} |" for s in settings]


if __name__ == "__main__":
    sys.stdout.write(page())
