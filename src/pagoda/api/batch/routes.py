"""The routes of OpenAI's files and batches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.api.batch import batches, files
from pagoda.api.batch.protocol import Batch, BatchBody, BatchList, FileDeleted, FileList, FileObject
from pagoda.api.http.query import schemas
from pagoda.api.serving.endpoint import Endpoint

_UPLOAD: Mapping[str, Any] = MappingProxyType(
    {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"enum": list(files.PURPOSES)},
        },
    }
)


def endpoints() -> tuple[Endpoint, ...]:
    file, batch = "/files/{file_id}", "/batches/{batch_id}"
    return (
        Endpoint("/files", ("POST",), files.upload, "Upload a file", reply=FileObject, form=_UPLOAD, openai=True),
        Endpoint(
            "/files", ("GET",), files.list_files, "List the files",
            reply=FileList, query=schemas("limit", "order", "after", "purpose"), openai=True,
        ),
        Endpoint(file, ("GET",), files.get_file, "Describe a file", reply=FileObject, openai=True),
        Endpoint(file, ("DELETE",), files.delete_file, "Delete a file", reply=FileDeleted, openai=True),
        Endpoint(
            file + "/content", ("GET",), files.file_content, "Read a file",
            media=("application/octet-stream",), openai=True,
        ),
        Endpoint(
            "/batches", ("POST",), batches.create_batch, "Answer the requests in a file, in its own time",
            BatchBody, Batch, openai=True,
        ),
        Endpoint(
            "/batches", ("GET",), batches.list_batches, "List the batches",
            reply=BatchList, query=schemas("limit", "after"), openai=True,
        ),
        Endpoint(batch, ("GET",), batches.get_batch, "How far a batch is", reply=Batch, openai=True),
        Endpoint(batch + "/cancel", ("POST",), batches.cancel_batch, "Stop a batch", reply=Batch, openai=True),
    )  # fmt: skip
