"""What serve and chat do alike with a model: find it, and settle its sampling defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pagoda.cli.screen import ProgressLine
from pagoda.config import Options
from pagoda.deploy.default_model import default_model_path
from pagoda.deploy.find_model import check_format, find_model
from pagoda.errors import BadRequest, ConfigError

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
    """The model's path; the default model is fetched where none was named."""
    if options.model is not None:
        path = find_model(options.model, os.environ)
    else:
        progress = ProgressLine()
        try:
            path = default_model_path(progress)
        finally:
            progress.clear()
    check_format(path, options.load_format, options.quantization)
    return path


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
    return {**(of_model if options.generation_config == "auto" else {}), **given}
