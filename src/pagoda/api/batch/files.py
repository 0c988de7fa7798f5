"""/v1/files: upload, list, look at, read and delete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol, TypeVar

from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from pagoda.api.batch.file_store import MAX_FILE_BYTES, new_file_id
from pagoda.api.batch.protocol import FileDeleted, FileList, FileObject, shown
from pagoda.api.batch.store import BatchStore
from pagoda.api.http.auth import caller_of
from pagoda.api.http.body import stream_body
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.http.query import choice, number
from pagoda.api.serving.kept import disk_full
from pagoda.api.serving.server import Server
from pagoda.errors import BadRequest, NotFound, PagodaError

PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
MAX_FIELDS = 16
_FORM_BYTES = 1 << 20


class NoFolder(PagodaError):
    """The server was started without a place for files."""

    status = 501
    code = "not_enabled"
    type = "NotImplementedError"


class HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=HasId)


def batches_of(server: Server) -> BatchStore:
    """Raises NoFolder where the server was given none."""
    if server.batches is None:
        raise NoFolder("files and batches need a folder", remedy="Start the server with --files-dir FOLDER")
    return server.batches


async def upload(server: Server, request: Request) -> Response:
    files = batches_of(server).files
    form = await _form(request)
    try:
        content, purpose = form.get("file"), form.get("purpose")
        if not isinstance(content, UploadFile):
            raise BadRequest("the form needs a field file that holds a file", param="file")
        if purpose not in PURPOSES:
            raise BadRequest(f"purpose must be one of {', '.join(PURPOSES)}", param="purpose")
        files.check_room(content.size or 0)
        file_id = new_file_id()
        await asyncio.to_thread(files.copy_in, content.file, file_id)
        # a form names the encoding of its names, and some of those give halves of surrogate pairs
        name = (content.filename or "file")[:255].encode("utf-8", "replace").decode()
        made = await asyncio.to_thread(files.keep, None, name, purpose, file_id, caller_of(request) or "")
        response = Response(to_json(shown(made, FileObject)), media_type=JSON)
        server.dress(response, [name for name in form if name not in ("file", "purpose")])
        return response
    finally:
        await form.close()


async def _form(request: Request) -> FormData:
    """The fields of a multipart form, files in temporary ones."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise BadRequest("a file is sent as multipart/form-data, with the fields file and purpose")

    async def parts() -> AsyncGenerator[bytes, None]:
        async for part in stream_body(request, MAX_FILE_BYTES + _FORM_BYTES):
            yield part

    try:
        return await MultiPartParser(request.headers, parts(), max_files=1, max_fields=MAX_FIELDS).parse()
    except OSError as error:
        raise disk_full(error) from error
    except (MultiPartException, FormParserError, LookupError, UnicodeError):
        raise BadRequest(
            f"the body is not a form of at most one file and {MAX_FIELDS} fields, as multipart/form-data writes it"
        ) from None


async def list_files(server: Server, request: Request) -> Response:
    files = [shown(each, FileObject) for each in batches_of(server).files.list(caller_of(request))]
    purpose = request.query_params.get("purpose")
    if purpose:
        files = [each for each in files if each.purpose == purpose]
    if choice(request, "order", ("asc", "desc"), "desc") == "asc":
        files = files[::-1]
    page, more = page_of(request, files, 10_000, 10_000)
    reply = FileList(
        data=page, first_id=page[0].id if page else None, last_id=page[-1].id if page else None, has_more=more
    )
    return Response(to_json(reply), media_type=JSON)


def page_of(request: Request, items: Sequence[T], default: int, most: int) -> tuple[list[T], bool]:
    """The items behind `after`, as many as `limit` says, and whether there are more."""
    after = request.query_params.get("after")
    if after:
        place = next((index for index, item in enumerate(items) if item.id == after), None)
        if place is None:
            raise NotFound(f"after: there is no {after[:80]!r} here", param="after")
        items = items[place + 1 :]
    limit = number(request, "limit", default, 1, most)
    return list(items[:limit]), len(items) > limit


async def get_file(server: Server, request: Request) -> Response:
    found = batches_of(server).files.get(request.path_params["file_id"], caller_of(request))
    return Response(to_json(shown(found, FileObject)), media_type=JSON)


async def file_content(server: Server, request: Request) -> Response:
    files = batches_of(server).files
    found = files.get(request.path_params["file_id"], caller_of(request))
    # Never as a page: what somebody uploaded must not run in the browser of somebody else.
    headers = {"x-content-type-options": "nosniff"}
    return FileResponse(
        files.path(found.id), headers=headers, media_type="application/octet-stream", filename=found.filename
    )


async def delete_file(server: Server, request: Request) -> Response:
    """Forget a file. One that a batch still reads stays."""
    batches = batches_of(server)
    file_id = request.path_params["file_id"]
    batches.files.get(file_id, caller_of(request))
    if any(not each.is_over and each.input_file_id == file_id for each in batches.list()):
        raise BadRequest("a batch that is not over reads this file", remedy="Cancel the batch first", param="file_id")
    batches.files.delete(file_id)
    return Response(to_json(FileDeleted(id=file_id)), media_type=JSON)
