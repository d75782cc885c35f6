"""Forms with a file in them (`multipart/form-data`, RFC 7578), written to disk as they come.

Starlette's own parser puts files of any size into the system's directory for temporary ones, from where they would
have to be copied; this one is as strict about the rest of the form, and writes the file where it is to stay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from localmoe.core.errors import InvalidRequestError, RequestTooLargeError
from localmoe.gateway.jobs.folder import FileWriter

_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 4096
_MAX_HEADER_BYTES = 8192
_MAX_NAME_CHARS = 255


@dataclass(kw_only=True)
class Form:
    """What came beside the file's contents."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """Of the file; None: there was none."""


@dataclass(kw_only=True)
class _Part:
    name: str
    is_file: bool
    value: bytearray = field(default_factory=bytearray)


class UploadReader:
    """Reads one form.

    Args:
        file: gets the contents of the field named `file`.
    """

    def __init__(self, file: FileWriter, *, max_file_bytes: int) -> None:
        self._file = file
        self._max_file_bytes = max_file_bytes
        self._form = Form()
        self._part: _Part | None = None
        self._headers: dict[bytes, bytes] = {}
        self._header_name, self._header_value = bytearray(), bytearray()
        self._num_header_bytes = 0
        self._contents: list[bytes] = []
        self._is_complete = False

    async def read(self, request: Request) -> Form:
        """Everything but the contents.

        Raises:
            InvalidRequestError: it is no such form, or has no file in it.
            RequestTooLargeError: the file is too large.
            StorageError: see `FileWriter.write`.
        """
        with _explained():
            parser = self._parser(request)
        async for chunk in request.stream():
            with _explained():
                parser.write(chunk)
            for contents in self._contents:
                await self._file.write(contents)
                if self._file.num_bytes > self._max_file_bytes:
                    raise RequestTooLargeError(f"the file is larger than the {self._max_file_bytes} bytes allowed")
            self._contents.clear()
        if not self._is_complete:
            raise InvalidRequestError("the form does not end as its content-type says")
        if self._form.filename is None:
            raise InvalidRequestError("file is required", param="file", code="missing_required_parameter")
        return self._form

    def _parser(self, request: Request) -> MultipartParser:
        content_type, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary")
        if content_type != b"multipart/form-data" or not boundary:
            raise InvalidRequestError("content-type must be multipart/form-data, with a boundary")
        return MultipartParser(
            boundary,
            callbacks={
                "on_part_begin": self._begin_part,
                "on_header_field": self._on_header_name,
                "on_header_value": self._on_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_contents,
                "on_part_data": self._on_contents,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def _begin_part(self) -> None:
        self._headers = {}
        self._num_header_bytes = 0

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._count_header(end - start)

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._count_header(end - start)

    def _count_header(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > _MAX_HEADER_BYTES:
            raise InvalidRequestError(f"a part of the form has more than {_MAX_HEADER_BYTES} bytes of headers")

    def _end_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _begin_contents(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        is_file = name == "file"
        if is_file:
            if self._form.filename is not None:
                raise InvalidRequestError("file is there twice", param="file")
            self._form.filename = _plain_name(filename or b"file")
        elif name in self._form.fields or len(self._form.fields) >= _MAX_FIELDS:
            raise InvalidRequestError("the form has a field twice, or too many", param=name[:_MAX_NAME_CHARS])
        self._part = _Part(name=name[:_MAX_NAME_CHARS], is_file=is_file)

    def _on_contents(self, data: bytes, start: int, end: int) -> None:
        assert self._part is not None
        if self._part.is_file:
            self._contents.append(data[start:end])
            return
        self._part.value += data[start:end]
        if len(self._part.value) > _MAX_FIELD_BYTES:
            raise InvalidRequestError(f"it is longer than {_MAX_FIELD_BYTES} bytes", param=self._part.name)

    def _end_part(self) -> None:
        assert self._part is not None
        if not self._part.is_file:
            self._form.fields[self._part.name] = self._part.value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._is_complete = True


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise InvalidRequestError(f"the body is no valid form: {error}") from error


def _plain_name(filename: bytes) -> str:
    """Without directories and what cannot be shown; for people only, since files are kept under names of ours."""
    name = filename.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    return "".join(char for char in name if char.isprintable())[:_MAX_NAME_CHARS] or "file"
