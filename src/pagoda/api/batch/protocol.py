"""The bodies and replies of /v1/files and /v1/batches as typed structs, and the lines of a batch's files."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]  # fmt: skip


class FileObject(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class KeptFile(FileObject, kw_only=True):
    """As it is stored. `owner`: whose key it came with; "" is of a server that asked for none, and everybody's."""

    owner: str = ""


class FileDeleted(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class FileList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchBody(msgspec.Struct, kw_only=True):
    """POST /v1/batches"""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


class BatchError(msgspec.Struct, kw_only=True):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(msgspec.Struct, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    created_at: int
    expires_at: int
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None

    @property
    def is_over(self) -> bool:
        return self.status in ("failed", "completed", "expired", "cancelled")


class KeptBatch(Batch, kw_only=True):
    """As it is stored, with its owner as files have one."""

    owner: str = ""


class BatchList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchLine(msgspec.Struct, kw_only=True):
    """One request of a batch's input."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


class LineResponse(msgspec.Struct, kw_only=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct, kw_only=True):
    code: str
    message: str


class BatchResult(msgspec.Struct, kw_only=True):
    """One line of a batch's output, or of its errors."""

    id: str
    custom_id: str | None
    response: LineResponse | None
    error: LineError | None = None


def is_of(kept: KeptFile | KeptBatch, owner: str | None) -> bool:
    """May this caller see it? None: whoever asks may."""
    return owner is None or kept.owner in ("", owner)


def shown(kept: msgspec.Struct, kind: type[T]) -> T:
    """What clients see of it."""
    return msgspec.convert(kept, kind, from_attributes=True)
