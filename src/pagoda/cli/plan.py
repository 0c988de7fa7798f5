"""`pagoda plan`: does a model fit, with which context, for how many requests at once?"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagoda.cli.findings import take
from pagoda.cli.inputs import load, split
from pagoda.cli.screen import size, table
from pagoda.deploy.download.find_model import find_model
from pagoda.errors import ConfigError, ModelError
from pagoda.options.check import check
from pagoda.options.config import declared
from pagoda.options.resolve import COMMAND_LINE, DEFAULT, Settings
from pagoda.options.tasks import Task

if TYPE_CHECKING:
    from pagoda.deploy.plan.machines import Machine
    from pagoda.deploy.plan.model import PlannedModel
    from pagoda.deploy.plan.plan import Plan

HELP = """\
Usage: pagoda plan MODEL [options]

Says before anything is loaded what MODEL takes of the memory, the longest context and the number of requests at once
that fit, and what would make it fit if it does not. MODEL is a folder, a .gguf file, a config.json alone, or a hub
name, of which only config.json is fetched.
The exit code is 0 if it fits, else 1.

Examples:
  pagoda plan ./qwen3-0.6b
  pagoda plan Qwen/Qwen3-32B-AWQ --gpu 2x4090
  pagoda plan ./qwen3-4b --ram 24GiB --quantization int4
  pagoda plan ./qwen3-32b/config.json --gpu "2x16GiB" --quantization awq --max-model-len 26624 \\
      --gpu-memory-utilization 0.95

Options:
  --gpu WHAT   plan for GPUs: h200, a100-80, 4x4090, "2x16GiB"; without it, for the CPU of this machine
  --ram SIZE   plan for a CPU with this much free memory (24GiB) in place of this machine's
  --json       the plan for a program
and the options of pagoda serve: --max-model-len, --gpu-memory-utilization, --tensor-parallel-size, --quantization,
--dtype, --max-num-seqs, --max-num-batched-tokens, --kv-cache-memory-bytes, --kv-cache-dtype, --runner,
--speculative-config, --mmproj, --lora-modules, --max-loras, --max-lora-rank
"""

_BAR = 64
_PARTS = (
    ("weights", "#", "34"),
    ("images", "i", "36"),
    ("KV cache", "=", "32"),
    ("work", "+", "33"),
    ("draft model", "d", "31"),
    ("CUDA", "x", "35"),
)


def run(words: list[str]) -> int:
    given, rest = take(words, ("json",), ("gpu", "ram"))
    if "help" in given:
        print(HELP, end="")
        return 0
    settings = load(split(rest), os.environ)
    if settings.options.model is None:
        raise ConfigError("pagoda plan needs a model", remedy="Write: pagoda plan FOLDER")
    from pagoda.deploy.plan.plan import make_plan

    machine = _machine(given)
    if not machine.count:
        check(settings)
    path, model = _model(settings.options.model, settings.options.engine_config("").task, settings.options.mmproj)
    asked = settings.origins["tensor_parallel_size"] != DEFAULT
    gpus = settings.options.tensor_parallel_size if asked else None
    plan = make_plan(model, settings.options.engine_config(path), machine, gpus)
    if "json" in given:
        print(_json(settings, model, plan))
    else:
        print(_text(settings, model, plan))
    return 0 if plan.fits else 1


def _model(name: str, task: Task, mmproj: str | None) -> tuple[str, PlannedModel]:
    """A model that is here, or else what its hub's config.json alone tells."""
    from pagoda.deploy.plan.model import model_of_config, planned_model

    try:
        path = find_model(name, os.environ)
    except ModelError:
        from pagoda.deploy.plan.remote import remote_config

        remote = remote_config(name, os.environ)
        if remote is None:
            raise
        config, host = remote
        note = f"planned from {host}'s config.json; nothing else was fetched"
        return name, model_of_config(config, (note,), name, task)
    return path, planned_model(Path(path), task, mmproj)


def _machine(given: dict[str, str]) -> Machine:
    from pagoda.backend.cpu.machine import free_memory_bytes
    from pagoda.deploy.plan.machines import Machine, parse_gpus, parse_memory

    if "gpu" in given and "ram" in given:
        raise ConfigError("--gpu and --ram contradict each other", remedy="Give one of them")
    if "gpu" in given:
        return parse_gpus(given["gpu"])
    if "ram" in given:
        return Machine("a CPU", parse_memory(given["ram"], "--ram"))
    return Machine("this CPU", free_memory_bytes())


def _text(settings: Settings, model: PlannedModel, plan: Plan) -> str:
    name, spec = settings.options.model, model.spec
    kinds = f"{model.parameters / 1e9:.2f} billion parameters, {_kinds(model, plan)}"
    parts = [f"\n{name}: {spec.model_type}, {kinds}"]
    parts += [f"note: {note}" for note in _notes(model, plan)]
    parts += ["", picture(plan, sys.stdout.isatty()), "", table(_rows(model, plan)), ""]
    if plan.fits:
        parts += ["It fits. To serve it:", "", f"  {_command(settings, plan, {})}", ""]
        return "\n".join(parts)
    need, usable = size(plan.needed_bytes), size(plan.usable_bytes)
    where = " of each GPU" if plan.gpus > 1 else ""
    wanted = f"with a context of {plan.wanted_context} tokens"
    parts += [f"It does not fit {wanted}: {need}{where} would be needed, and {usable} may be used."]
    if plan.cures:
        parts += ["With one of these it does:", ""]
        parts += [f"  {_command(settings, plan, dict(cure))}" for cure in plan.cures]
    else:
        parts += ["A smaller model does, or a smaller quantization of this one."]
    return "\n".join([*parts, ""])


def _kinds(model: PlannedModel, plan: Plan) -> str:
    from pagoda.options.formats import QUANTIZATION_METHODS

    found = model.method or next(iter(model.tensors.values())).type
    asked = plan.quantization
    if asked is None or QUANTIZATION_METHODS.get(asked, asked) == model.method:
        return found
    return f"{found} as {asked}"


def _notes(model: PlannedModel, plan: Plan) -> list[str]:
    notes = list(model.notes)
    if model.method is None and plan.quantization in ("awq", "awq_marlin", "gptq", "gptq_marlin", "auto_awq"):
        notes.append(f"these weights are floats: this is the plan for the {plan.quantization} version of the model")
    return notes


def _rows(model: PlannedModel, plan: Plan) -> list[tuple[str, str]]:
    rows = [
        ("weights", f"{size(plan.weight_bytes)}{' on each GPU' if plan.gpus > 1 else ''}"),
        *([("images", f"{size(plan.image_bytes)}: their encoder and its work")] if plan.image_bytes else []),
        ("KV cache", f"{size(plan.kv_bytes)}, {plan.kv_bytes_per_token / 1024:g} KiB for each token"),
        ("work", f"{size(plan.activation_bytes)} for steps of {plan.limits.max_num_batched_tokens} tokens"),
    ]
    if plan.draft_bytes:
        rows.append(("draft", f"{size(plan.draft_bytes)}: its weights, cache and work"))
    rows.append(("CUDA" if plan.gpus else "processes", f"about {size(plan.overhead_bytes)}"))
    if plan.gpus:
        rows.append(("GPUs", f"{plan.gpus}; sizes that work: {', '.join(map(str, plan.parallel_sizes))}"))
    rows.append(("context", f"{plan.context} tokens (the model: {model.spec.max_position})"))
    if plan.longest_context > plan.context:
        rows.append(("longest", f"{plan.longest_context} tokens would fit"))
    if plan.fits:
        each = ", ".join(f"{count} of {context} tokens" for context, count in plan.parallel().items())
        rows.append(("in parallel", each))
    return rows


def picture(plan: Plan, color: bool) -> str:
    """The memory as a bar: what is taken by what, what is left, and where the limit is when it is too much."""
    cache = plan.kv_bytes or plan.needed_bytes - plan.fixed_bytes
    sizes = (
        plan.weight_bytes,
        plan.image_bytes,
        cache,
        plan.activation_bytes,
        plan.draft_bytes,
        plan.overhead_bytes,
    )
    width = min(_BAR, max(16, shutil.get_terminal_size().columns - 4))
    total = max(plan.machine.memory_bytes, sum(sizes), 1)
    bar, end, at = "", 0, 0
    for (_, mark, code), count_bytes in zip(_PARTS, sizes, strict=True):
        end += count_bytes
        cells = max(round(end / total * width), at + (count_bytes > 0)) - at
        cells = max(0, min(cells, width - at))
        at += cells
        bar += f"\x1b[{code}m{mark * cells}\x1b[0m" if color else mark * cells
    bar += "." * (width - at)
    free = plan.machine.memory_bytes - sum(sizes)
    shown = [f"{mark} {name} {size(b)}" for (name, mark, _), b in zip(_PARTS, sizes, strict=True) if b]
    if not plan.gpus:
        shown = [text.replace("x CUDA", "x processes") for text in shown]
    shown.append(f". free {size(free)}" if free >= 0 else f"and {size(-free)} too much")
    what = f"each of {plan.machine.name}" if plan.machine.count > 1 else plan.machine.name
    head = f"  {what}: {size(plan.machine.memory_bytes)}{'' if plan.gpus else ' free'}, {plan.share:.0%} may be used"
    lines = [head, f"  [{bar}]", "   " + "   ".join(shown)]
    limit = round(plan.usable_bytes / total * width)
    lines.insert(
        2, "   " + (f"{'the limit ^':>{limit}}" if limit > width // 2 else " " * max(0, limit - 1) + "^ the limit")
    )
    return "\n".join(lines)


def _command(settings: Settings, plan: Plan, cure: dict[str, str]) -> str:
    """What to type: the options as they were given, with those of the cure."""
    words = ["pagoda", "serve", settings.options.model or ""]
    chosen: dict[str, str] = {}
    for setting in declared():
        if settings.origins[setting.name] == COMMAND_LINE and setting.name != "model":
            value: Any = getattr(settings.options, setting.name)
            name = setting.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            elif isinstance(value, tuple):
                words += [f"--{name}", *map(str, value)]
            else:
                chosen[name] = str(value)
    if plan.gpus > 1:
        chosen["tensor-parallel-size"] = str(plan.gpus)
    if plan.gpus and plan.fits and "max-model-len" not in chosen:
        chosen["max-model-len"] = str(plan.context)
    for name, value in {**chosen, **cure}.items():
        words += [f"--{name}", value]
    if words[2].endswith("config.json"):
        words[2] = os.path.dirname(words[2]) or "."
    return shlex.join(words)


def _json(settings: Settings, model: PlannedModel, plan: Plan) -> str:
    import json

    content = {
        "model": settings.options.model,
        "architecture": model.spec.model_type,
        "parameters": model.parameters,
        "quantization": plan.quantization or model.method,
        "fits": plan.fits,
        "machine": plan.machine.name,
        "gpus": plan.gpus,
        "memory_bytes": plan.machine.memory_bytes,
        "usable_bytes": plan.usable_bytes,
        "needed_bytes": plan.needed_bytes,
        "weight_bytes": plan.weight_bytes,
        "kv_bytes": plan.kv_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "activation_bytes": plan.activation_bytes,
        "overhead_bytes": plan.overhead_bytes,
        "draft_bytes": plan.draft_bytes,
        "image_bytes": plan.image_bytes,
        "num_blocks": plan.blocks,
        "max_model_len": plan.context,
        "longest_context": plan.longest_context,
        "parallel_requests": plan.parallel() if plan.fits else {},
        "tensor_parallel_sizes": list(plan.parallel_sizes),
        "cures": [dict(cure) for cure in plan.cures],
        "notes": _notes(model, plan),
        "command": _command(settings, plan, {} if plan.fits or not plan.cures else dict(plan.cures[0])),
    }
    return json.dumps(content, ensure_ascii=False, indent=2)
