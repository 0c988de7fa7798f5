"""What can go wrong while a model is fetched: what another source may cure, and what it cannot."""

from __future__ import annotations

import errno
from pathlib import Path

from pagoda.errors import ModelError


class SourceFailed(ModelError):
    """This source cannot give the model or a file of it; another one may."""

    status = 404
    code = "model_not_found"
    type = "NotFoundError"


class Unreachable(SourceFailed):
    """No answer, or none that makes sense."""

    status = 502
    code = "hub_unreachable"
    type = "BadGatewayError"
    exit_code = 69


class AccessDenied(ModelError):
    """The source knows the model and refuses it: gated, private, or a wrong token. No other source is asked."""

    status = 403
    code = "access_denied"
    type = "PermissionDeniedError"
    exit_code = 77


class DiskFailed(ModelError):
    """What was fetched cannot be written."""

    status = 507
    code = "insufficient_storage"
    type = "InternalServerError"
    exit_code = 74


_WHY = {
    errno.ENOSPC: ("the disk is full", "Free some space and run it again: it goes on where it was"),
    errno.EDQUOT: ("your quota on this disk is used up", "Free some space and run it again: it goes on where it was"),
    errno.EROFS: ("the disk is mounted read-only", "Name a folder that can be written: --local-dir DIR"),
    errno.EACCES: ("this user may not write there", "Name a folder of your own: --local-dir DIR, or set HF_HOME"),
    errno.EPERM: ("this user may not write there", "Name a folder of your own: --local-dir DIR, or set HF_HOME"),
    errno.ENAMETOOLONG: ("the name is too long for this disk", "Name a folder with a shorter path: --local-dir DIR"),
}


def disk_failed(error: OSError, place: Path) -> DiskFailed:
    """The sentence for an error of the file system."""
    default = (error.strerror or str(error), "Name another folder: --local-dir DIR")
    why, remedy = _WHY.get(error.errno or 0, default)
    return DiskFailed(f"Cannot write to {place}: {why}", remedy=remedy)
