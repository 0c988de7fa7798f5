"""The hubs and caches as a server reaches them, for clients that fetch and remove models through it."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from pagoda.api.serving.hub import Show
from pagoda.errors import BadRequest, ConfigError, NotFound, Overloaded, PagodaError

MAX_PULLS = 2


class Models:
    """What `pagoda pull` and `pagoda rm` do. A few pulls run at once, others are sent away.

    `served` is the path of the model in use, which stays, whatever names it is served under.
    """

    def __init__(self, served: str | None = None) -> None:
        self._served = None if served is None else Path(os.path.realpath(served))
        self._free = threading.BoundedSemaphore(MAX_PULLS)

    def pull(self, name: str, show: Show) -> None:
        # Only here: a server starts faster without what a pull needs.
        from pagoda.deploy.download.pull import Report, pull, wanted

        if not self._free.acquire(blocking=False):
            raise Overloaded(f"{MAX_PULLS} models are being fetched already", remedy="Wait for one of them")
        try:
            pull(wanted(name), os.environ, Report(lambda progress: show(progress.done_bytes, progress.total_bytes)))
        except ConfigError as error:
            raise BadRequest(error.message, remedy=error.remedy, param="model") from None
        finally:
            self._free.release()

    def created(self, name: str) -> str | None:
        from pagoda.deploy.download.created import created_model

        return created_model(name)

    def keep(self, name: str, files: Mapping[str, Path], texts: Mapping[str, str]) -> str:
        from pagoda.deploy.download.created import keep

        place = self.created(name)
        if place is not None and self._served is not None and Path(os.path.realpath(place)) == self._served:
            raise BadRequest(f"model '{name}' is being served", remedy="Take another name", param="model")
        return str(keep(name, files, texts))

    def architecture(self, path: Path) -> str | None:
        from pagoda.weights.open import open_source

        source = open_source(str(path))
        found = str(source.metadata.get("general.architecture")) if source.metadata else None
        source.close()
        return found

    def check_template(self, source: str) -> None:
        import jinja2

        from pagoda.text.chat import ChatTemplate

        try:
            ChatTemplate(source)
        except (PagodaError, jinja2.TemplateError) as error:
            raise BadRequest(
                f"template: it is not in Jinja: {error}",
                remedy="Leave template out to use the file's own, or give it in Jinja, as models on hubs have it",
                param="template",
            ) from None

    def delete(self, name: str) -> None:
        from pagoda.deploy.download.cached import cached_models, remove

        found = [model for model in cached_models(os.environ) if model.name == name]
        if not found:
            raise NotFound(f"model '{name}' not found in the caches", param="model")
        folders = [folder.resolve() for model in found for folder in model.folders]
        if self._served is not None and any(folder in (self._served, *self._served.parents) for folder in folders):
            raise BadRequest(f"model '{name}' is being served", remedy="Stop this server first", param="model")
        for model in found:
            remove(model)
