"""Encodes the images that requests wait for: in pieces between steps, so that streams go on meanwhile."""

from __future__ import annotations

import logging

from pagoda.backend.base import Executor
from pagoda.errors import EngineError
from pagoda.sched.scheduler import Scheduler
from pagoda.types import Delta

_log = logging.getLogger(__name__)


def look(scheduler: Scheduler, executor: Executor) -> list[Delta]:
    """Encode a part of the image that is needed next. Where that fails, all that need it end."""
    wanted = scheduler.wanted_image()
    if wanted is None:
        return []
    image, most_s = wanted
    try:
        executor.encoded(image, most_s)
    except Exception as error:
        _log.exception("an image cannot be encoded")
        told = error.message if isinstance(error, EngineError) else "the engine failed to encode an image"
        failed = scheduler.needing(image)
        for request_id in failed:
            scheduler.cancel(request_id)
        return [Delta(request_id=request_id, finish_reason="error", error=told) for request_id in failed]
    return []
