"""What serve and chat do alike with a model: find it, and settle its sampling defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pagoda.cli.screen import ProgressLine
from pagoda.deploy.download import default_model
from pagoda.deploy.download.find_model import cached_model, check_format, find_model
from pagoda.deploy.download.hub import offline, split_name
from pagoda.errors import BadRequest, ConfigError
from pagoda.options.config import Options

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def local_model(options: Options) -> str:
    """The model's path; a hub name is fetched on first use, like the default model."""
    if options.models:
        raise ConfigError("Several models were named", remedy="Name one here; pagoda serve takes several")
    if options.model is not None:
        path = _found_or_fetched(options, options.model)
    else:
        progress = ProgressLine()
        try:
            path = default_model.default_model_path(progress)
        finally:
            progress.clear()
    check_format(path, options.load_format, options.quantization)
    # A link on the way, such as that to the version in use, may lead elsewhere when the engine is started again.
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name) if folder else path


def _found_or_fetched(options: Options, name: str) -> str:
    """A path, or what the caches have; else it is fetched, unless that is forbidden."""
    environ = dict(os.environ)
    if options.download_dir is not None:
        environ["HF_HUB_CACHE"] = options.download_dir
    if Path(name).expanduser().exists() or split_name(name) is None:
        return find_model(name, environ)
    cached = cached_model(name, environ, options.revision)
    if cached is not None:
        return cached
    if offline(environ):
        return find_model(name, environ)
    from pagoda.cli.pull import fetch
    from pagoda.deploy.download.pull import wanted

    return str(fetch(replace(wanted(name), revision=options.revision), environ).model)


def sampling_defaults(options: Options, of_model: Mapping[str, float | int]) -> dict[str, float | int]:
    """Values for requests that give none: the model's (unless those are not wanted), then the user's."""
    from pagoda.types import SamplingParams

    flag, given = "--override-generation-config", options.override_generation_config
    names = ", ".join(SAMPLING)
    for name, value in given.items():
        if name not in SAMPLING or isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{flag}: {name} is not a sampling parameter with a number", remedy=f"Those are {names}")
    try:
        SamplingParams(**given).check(vocab_size=1)
    except BadRequest as error:
        raise ConfigError(f"{flag}: {error.message}") from None
    if options.generation_config != "auto":
        return dict(given)
    return {**(default_model.SAMPLING if options.model is None else {}), **of_model, **given}
