"""From the options of `pagoda serve` to a plan of what to pack: nothing of this machine, and no secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagoda.deploy.download.default_model import NAME
from pagoda.deploy.pack.pack import HERE, Draft, Plan, encoder_place
from pagoda.deploy.service.options import plain
from pagoda.deploy.service.service import name_for
from pagoda.errors import ConfigError
from pagoda.options.config import Options, declared
from pagoda.options.resolve import DEFAULT, Settings

_DONE_HERE = ("model", "download_dir", "revision")
_OF_A_MACHINE = ("files_dir", "log_file", "uds")


def plan(settings: Settings, model: str, out: str | None) -> Plan:
    """What to pack; `model` is where the model is on this machine."""
    options = settings.options
    given = {s.name for s in declared() if settings.origins[s.name] != DEFAULT and not s.secret}
    for name in _OF_A_MACHINE:
        if name in given:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is a place on this machine", remedy=f"Leave {flag} out; give it on the new one")
    values = {name: getattr(options, name) for name in given if name not in _DONE_HERE}
    path, called = Path(model), _called(options)
    values.setdefault("served_model_name", (called,))
    template = options.chat_template
    if template and "{" not in template and Path(template).expanduser().is_file():
        values["chat_template"] = Path(template).expanduser().read_text("utf-8")
    draft = _draft(options.speculative_config)
    if draft is not None:
        values["speculative_config"] = {**options.speculative_config, "model": f"{HERE}/{draft.place}"}
    name = name_for(called)
    folder = called.rstrip("/").rpartition("/")[2].partition(":")[0] or name
    encoder = None if options.mmproj is None else Path(options.mmproj).expanduser()
    if encoder is not None:
        if not encoder.is_file():
            raise ConfigError(f"There is no image encoder {encoder}", remedy="Give --mmproj its file, or leave it out")
        values["mmproj"] = f"{HERE}/{encoder_place(folder, encoder)}"
    return Plan(
        name=name,
        model=path,
        folder=folder,
        options={s.name.replace("_", "-"): plain(values[s.name]) for s in declared() if s.name in values},
        out=Path(os.path.abspath(os.path.expanduser(out or f"{name}.pagoda"))),
        draft=draft,
        encoder=encoder,
    )


def _called(options: Options) -> str:
    """The name under which clients ask for the model."""
    if options.served_model_name:
        return options.served_model_name[0]
    if options.model is None:
        return NAME
    path = Path(options.model).expanduser()
    return path.absolute().name.removesuffix(".gguf") if path.exists() else options.model


def _draft(config: Mapping[str, Any]) -> Draft | None:
    if not isinstance(config.get("model"), str):
        return None
    path = Path(config["model"]).expanduser()
    if not path.exists():
        raise ConfigError(f"There is no draft model {path}", remedy="Name it by its path in --speculative-config")
    return Draft(path, f"draft/{path.name}")
