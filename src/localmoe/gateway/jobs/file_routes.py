"""`/v1/files`: what clients keep here, and what batches have made for them."""

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response

from localmoe.core.errors import InvalidRequestError, NotFoundError, RequestTooLargeError
from localmoe.core.jobs import FileQuery, FileRecord
from localmoe.gateway.errors import ApiError
from localmoe.gateway.exchange import CLIENT_LEFT, current_principal
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.gateway.jobs.folder import FileFolder, new_file_id
from localmoe.gateway.jobs.owners import ID_PATTERN, MAX_ID_CHARS, could_be_id, visible_owner
from localmoe.gateway.jobs.uploads import Form, UploadReader
from localmoe.gateway.openapi import ERROR_RESPONSES

UPLOAD_PATH = "/v1/files"
_PURPOSES = ("batch", "user_data")
_MAX_LISTED, _MAX_PAGE = 10_000, 1000
"""What may be asked for, and what comes at once."""
_After = Annotated[
    str | None,
    Query(max_length=MAX_ID_CHARS, pattern=ID_PATTERN, description="Behind the file of this id."),
]
_MIN_LIFETIME_S, _MAX_LIFETIME_S = 3600, 30 * 24 * 3600
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FORM_BYTES = 1 << 16
"""What a form may have beside its file."""
_UPLOAD_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": list(_PURPOSES)},
                    _ANCHOR: {"type": "string", "enum": ["created_at"]},
                    _SECONDS: {"type": "integer", "minimum": _MIN_LIFETIME_S, "maximum": _MAX_LIFETIME_S},
                },
            }
        }
    },
}


class FileObject(BaseModel):
    """One file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(BaseModel):
    """Some files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """It is there no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def router(folder: FileFolder, config: JobsConfig) -> APIRouter:
    """The routes over these files."""
    routes = APIRouter(tags=["files"], responses=ERROR_RESPONSES)

    @routes.post(
        UPLOAD_PATH,
        summary="Keep a file",
        response_model=FileObject,
        openapi_extra={"requestBody": _UPLOAD_FORM},
    )
    async def upload_file(request: Request) -> FileObject | Response:
        return await _upload(request, folder, config)

    @routes.get("/v1/files", summary="List files")
    async def list_files(
        purpose: Annotated[str | None, Query(max_length=32, pattern=ID_PATTERN)] = None,
        after: _After = None,
        limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = _MAX_LISTED,
        order: Literal["asc", "desc"] = "desc",
    ) -> FileList:
        page_size = min(limit, _MAX_PAGE)
        query = FileQuery(
            owner_id=visible_owner(),
            purpose=purpose,
            after=after,
            limit=page_size + 1,
            newest_first=order == "desc",
        )
        found = await folder.store.page(query)
        shown = [_shown(record) for record in found[:page_size]]
        return FileList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(found) > page_size,
        )

    @routes.get("/v1/files/{file_id}", summary="Describe a file")
    async def get_file(file_id: str) -> FileObject:
        return _shown(await find_file(folder, file_id))

    @routes.get(
        "/v1/files/{file_id}/content",
        summary="Get a file",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": {}}, "description": "Its contents."}},
    )
    async def get_file_content(file_id: str) -> Response:
        record = await find_file(folder, file_id)
        path = folder.path(record.id)
        if not await asyncio.to_thread(path.is_file):
            raise NotFoundError(
                f"the contents of file {record.id} are not on this server any more", param="file_id"
            )
        return FileResponse(path, media_type="application/octet-stream", filename=record.filename)

    @routes.delete("/v1/files/{file_id}", summary="Delete a file")
    async def delete_file(file_id: str) -> FileDeleted:
        record = await find_file(folder, file_id)
        await folder.delete(record.id)
        return FileDeleted(id=record.id)

    return routes


async def find_file(folder: FileFolder, file_id: str, *, param: str = "file_id") -> FileRecord:
    """A file that whoever asks may see.

    Raises:
        NotFoundError: there is none.
    """
    owner_id = visible_owner()
    record = await folder.store.get(file_id, owner_id=owner_id) if could_be_id(file_id) else None
    if record is None:
        raise NotFoundError(f"there is no file {file_id[:100]!r}", param=param)
    return record


def _declared_bytes(request: Request) -> int:
    """Of the file at least, as far as is known before it comes."""
    declared = request.headers.get("content-length", "0")
    return max(0, int(declared[:20]) - _FORM_BYTES) if declared.isdecimal() else 0


async def _upload(request: Request, folder: FileFolder, config: JobsConfig) -> FileObject | Response:
    """Keep what a form brings; nothing of it is kept if that cannot be done whole."""
    owner_id = current_principal().id
    if (declared_bytes := _declared_bytes(request)) > config.max_file_bytes:
        raise RequestTooLargeError(f"the file is larger than the {config.max_file_bytes} bytes allowed")
    file_id = new_file_id()
    upload = folder.upload(file_id, owner_id, least_bytes=declared_bytes)
    try:
        async with asyncio.timeout(config.upload_timeout_s), upload as writer:
            form = await UploadReader(writer, max_file_bytes=config.max_file_bytes).read(request)
            purpose, lifetime_s = _checked(form)
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)
    except TimeoutError:
        message = f"the file did not come whole within {config.upload_timeout_s:g} s"
        return ApiError(status=408, message=message, code="request_timeout").response({"connection": "close"})
    now_s = time.time()
    record = FileRecord(
        id=file_id,
        owner_id=owner_id,
        filename=form.filename or "file",
        purpose=purpose,
        num_bytes=writer.num_bytes,
        created_at=now_s,
        expires_at=None if lifetime_s is None else now_s + lifetime_s,
    )
    await folder.add(record)
    return _shown(record)


def _checked(form: Form) -> tuple[str, int | None]:
    """Purpose and lifetime."""
    unknown = sorted(form.fields.keys() - {"purpose", _ANCHOR, _SECONDS})
    if unknown:
        raise InvalidRequestError(
            f"{unknown[0]} is not a field of this API", param=unknown[0], code="unknown_parameter"
        )
    purpose = form.fields.get("purpose")
    if purpose not in _PURPOSES:
        given = f"purpose is {purpose[:50]!r}" if purpose else "purpose is required"
        raise InvalidRequestError(f"{given}; it must be one of {', '.join(_PURPOSES)}", param="purpose")
    if _ANCHOR not in form.fields and _SECONDS not in form.fields:
        return purpose, None
    if form.fields.get(_ANCHOR) != "created_at":
        raise InvalidRequestError(f"{_ANCHOR} must be 'created_at'", param=_ANCHOR)
    seconds = form.fields.get(_SECONDS, "")
    if (
        not (seconds.isascii() and seconds.isdecimal() and len(seconds) <= len(str(_MAX_LIFETIME_S)))
        or not _MIN_LIFETIME_S <= int(seconds) <= _MAX_LIFETIME_S
    ):
        raise InvalidRequestError(
            f"{_SECONDS} must be a number from {_MIN_LIFETIME_S} to {_MAX_LIFETIME_S}", param=_SECONDS
        )
    return purpose, int(seconds)


def _shown(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.id,
        bytes=record.num_bytes,
        created_at=int(record.created_at),
        expires_at=None if record.expires_at is None else int(record.expires_at),
        filename=record.filename,
        purpose=record.purpose,
    )
