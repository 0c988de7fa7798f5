"""From the options of `pagoda serve` to those of a service: whole paths, fixed names, secrets apart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagoda.deploy.download.find_model import cached_model, find_model
from pagoda.deploy.download.hub import split_name
from pagoda.errors import ConfigError
from pagoda.options.config import declared
from pagoda.options.resolve import DEFAULT, Settings

KEPT_VARIABLES = (
    "HF_TOKEN",
    "MODELSCOPE_API_TOKEN",
    "HF_ENDPOINT",
    "MODELSCOPE_ENDPOINT",
    "HF_HUB_OFFLINE",
    "VLLM_USE_MODELSCOPE",
    "PAGODA_UPSTREAM_API_KEY",
)
KEPT_ON_THIS_MACHINE = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "MODELSCOPE_CACHE",
    "PAGODA_CACHE",
    "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    *(name for proxy in ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY") for name in (proxy, proxy.lower())),
    "SSL_CERT_FILE",
)
_PATHS = ("download_dir", "files_dir", "log_file", "mmproj", "uds")


def service_options(settings: Settings, environ: Mapping[str, str]) -> dict[str, Any]:
    """What serve.yaml holds: all that was given, however it was given, but the secrets."""
    options = settings.options
    given = {s.name for s in declared() if settings.origins[s.name] != DEFAULT and not s.secret}
    values = {name: getattr(options, name) for name in given}
    if options.port == 0:
        raise ConfigError("a service needs a port that stays the same", remedy="Give one: --port 8000")
    if options.uds is not None:
        raise ConfigError("a service listens on a port, not on a Unix socket", remedy="Leave --uds out")
    if options.model is not None:
        values["model"] = _model_path(options.model, environ, options.revision)
        if values["model"] != options.model and not options.served_model_name:
            values["served_model_name"] = (options.model,)
    if options.models:
        values["models"] = tuple(_whole(each, environ, options.revision) for each in options.models)
    for name in _PATHS:
        if values.get(name):
            values[name] = _absolute(values[name])
    template = values.get("chat_template")
    if template and "{" not in template and Path(template).expanduser().is_file():
        values["chat_template"] = _absolute(template)
    draft = dict(values.get("speculative_config", {}))
    if draft.get("model"):
        values["speculative_config"] = {**draft, "model": _absolute(draft["model"])}
    return {s.name.replace("_", "-"): plain(values[s.name]) for s in declared() if s.name in values}


def _whole(table: Mapping[str, Any], environ: Mapping[str, str], revision: str | None) -> dict[str, Any]:
    """One of several models with its whole path, under the name that it has."""
    named = str(table.get("model", ""))
    model = _model_path(named, environ, table.get("revision", revision))
    has_name = any(key.replace("-", "_") == "served_model_name" for key in table)
    return {**table, "model": model, **({} if has_name or model == named else {"served-model-name": [named]})}


def service_secrets(settings: Settings, environ: Mapping[str, str], *, here: bool) -> dict[str, str]:
    """The environment of a service; `here`: on this machine, where its paths and proxies hold."""
    names = (*KEPT_VARIABLES, *KEPT_ON_THIS_MACHINE) if here else KEPT_VARIABLES
    found = {name: environ[name] for name in names if environ.get(name)}
    if "PYTHONPATH" in found:
        found["PYTHONPATH"] = os.pathsep.join(_absolute(p) for p in found["PYTHONPATH"].split(os.pathsep) if p)
    keys = settings.options.api_key
    if any("," in key for key in keys):
        raise ConfigError("an API key of a service may hold no comma", remedy="Use another key")
    return {**found, "PAGODA_API_KEY": ",".join(keys)} if keys else found


def _model_path(name: str, environ: Mapping[str, str], revision: str | None) -> str:
    """A path, or a hub name that is to be fetched."""
    if Path(name).expanduser().exists() or split_name(name) is None:
        return _absolute(find_model(name, environ))
    return cached_model(name, environ, revision) or name


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return dict(value) if isinstance(value, Mapping) else value
