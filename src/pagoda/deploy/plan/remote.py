"""Fetches the config.json of a model that is on a hub, and nothing else: enough to plan with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.deploy.download.failures import SourceFailed
from pagoda.deploy.download.fetch import get_json
from pagoda.deploy.download.hub import Listing, RemoteFile, offline, sources, split_name
from pagoda.errors import ModelError

CONFIG = "config.json"
_REVISIONS = {"huggingface": "main", "modelscope": "master"}


def remote_config(name: str, environ: Mapping[str, str], choice: str = "auto") -> tuple[dict[str, Any], str] | None:
    """The settings of a hub's model and where they are from; None if `name` is no hub name, or no hub may be asked."""
    split = split_name(name)
    if split is None or split[1] is not None or offline(environ):
        return None
    failed: list[str] = []
    for source in sources(choice, environ):
        revision = _REVISIONS[source.protocol]
        url = Listing(source, split[0], revision, revision, ()).url(RemoteFile(CONFIG, 0))
        try:
            config, _ = get_json(source.endpoint, url, tries=1)
        except SourceFailed as error:
            failed.append(error.message)
            continue
        if isinstance(config, dict):
            return config, source.endpoint.host
        failed.append(f"{source.endpoint.host} has no {CONFIG} of {split[0]}")
    raise ModelError(
        f"{CONFIG} of {name} cannot be fetched: {'; '.join(failed)}",
        remedy="Check the name and the network, set HF_ENDPOINT=https://MIRROR, or give a folder or its config.json",
    )
