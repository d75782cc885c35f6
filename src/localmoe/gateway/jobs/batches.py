"""A batch's files: requests in, answers and errors out, as JSON Lines in OpenAI's shapes."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from localmoe.core.errors import StorageFullError
from localmoe.core.jobs import FileRecord, ItemResult, ItemState, Job, JobWork, LineError, NewItem
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.gateway.jobs.folder import FileFolder, FileWriter, new_file_id

_MAX_ERRORS = 100
_MAX_BLANK_LINES = 10_000
"""Told of one file."""
_MAX_CUSTOM_ID_CHARS = 512
_PAGE_LINES, _PAGE_BYTES = 200, 8 * 2**20
"""Put into the store at once."""
_PAGE_RESULTS = 8
"""Taken out of it at once; each may be as long as an answer may be."""
_OUTPUT_PURPOSE = "batch_output"
_GONE = LineError(code="file_not_found", message="the file was deleted before it was read")


class _Line(msgspec.Struct):
    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_CUSTOM_ID_CHARS)]
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    stream: bool | None = None


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Error(msgspec.Struct):
    code: str
    message: str


class _Outcome(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _Response | None
    error: _Error | None


_UNANSWERED = {
    ItemState.CANCELLED: _Error("batch_cancelled", "The batch was cancelled before this request was answered."),
    ItemState.EXPIRED: _Error(
        "batch_expired", "This request could not be executed before the completion window expired."
    ),
}


class BatchFiles:
    """Reads and writes them.

    Args:
        max_line_bytes: says how long a line of a batch's file may be now.
    """

    def __init__(
        self, work: JobWork, folder: FileFolder, *, config: JobsConfig, max_line_bytes: Callable[[], int]
    ) -> None:
        self.folder = folder
        self._work = work
        self._config = config
        self._max_line_bytes = max_line_bytes

    async def read(self, job: Job, *, runner: str) -> None:
        """Take over the requests of a batch, or say what is wrong with its file. What was taken over before is
        left.

        Raises:
            StorageError: it cannot be done now.
        """
        assert job.input_file_id is not None
        record = await self.folder.store.get(job.input_file_id, owner_id=None)
        if record is None:
            await self._work.reject(job.id, [_GONE], runner=runner)
            return
        try:
            await self._take_over(job, self.folder.path(record.id), runner)
        except FileNotFoundError:
            await self._work.reject(job.id, [_GONE], runner=runner)

    async def _take_over(self, job: Job, path: Path, runner: str) -> None:
        max_bytes = self._max_line_bytes()  # which may change meanwhile
        errors, num_lines = await asyncio.to_thread(self._check, path, job.endpoint, max_bytes)
        if errors:
            await self._work.reject(job.id, errors, runner=runner)
            return
        pages = _pages(path, max_bytes)
        while page := await asyncio.to_thread(next, pages, None):
            if not await self._work.add_items(job.id, page, runner=runner):
                return  # it was cancelled
        await self._work.begin(job.id, num_items=num_lines, runner=runner)

    async def write(self, job: Job, *, runner: str) -> None:
        """Put the answers of a batch into files, and end it. The files are new ones each time, so that whoever is
        late replaces nothing that another runner has written.

        Raises:
            StorageError: it cannot be done now.
        """
        output_id, error_id = new_file_id(), new_file_id()
        try:
            async with self.folder.write(output_id) as output, self.folder.write(error_id) as errors:
                after = -1
                while results := await self._work.results(job.id, after=after, limit=_PAGE_RESULTS):
                    for result, line in await asyncio.to_thread(_with_lines, job, results):
                        await (output if result.state is ItemState.SUCCEEDED else errors).write(line)
                    after = results[-1].position
            closed = await self._work.close(
                job.id,
                output=self._record(job, output_id, output, "output"),
                errors=self._record(job, error_id, errors, "errors"),
                runner=runner,
            )
        except StorageFullError:  # nothing was kept; of any other failure that is not certain
            for file_id in (output_id, error_id):
                await self.folder.remove(file_id)
            raise
        for file_id, file in ((output_id, output), (error_id, errors)):
            if not closed or not file.num_bytes:
                await self.folder.remove(file_id)

    def _record(self, job: Job, file_id: str, file: FileWriter, kind: str) -> FileRecord | None:
        if not file.num_bytes:
            return None
        now_s = time.time()
        return FileRecord(
            id=file_id,
            owner_id=job.owner.id,
            filename=f"{job.id}_{kind}.jsonl",
            purpose=_OUTPUT_PURPOSE,
            num_bytes=file.num_bytes,
            created_at=now_s,
            expires_at=now_s + (job.output_lifetime_s or self._config.keep_ended_s),
        )

    def _check(self, path: Path, endpoint: str, max_bytes: int) -> tuple[list[LineError], int]:
        """What is wrong with a file, and how many requests it has."""
        errors: list[LineError] = []
        seen: set[str] = set()
        num_lines = 0
        for number, line in _lines(path, max_bytes):
            num_lines += 1
            if num_lines > self._config.max_batch_requests or len(errors) >= _MAX_ERRORS:
                break
            problem = _problem(line, endpoint, seen, max_bytes)
            if problem is not None:
                code, message, param = problem
                errors.append(LineError(code=code, message=message, line=number, param=param))
        if num_lines > self._config.max_batch_requests:
            message = (
                f"the file has more than the {self._config.max_batch_requests} requests that a batch may have"
            )
            errors = [LineError(code="too_many_requests", message=message)]
        if not num_lines:
            errors = [LineError(code="empty_file", message="the file has no requests; each is a line of JSON")]
        return errors, num_lines


def _pages(path: Path, max_bytes: int) -> Iterator[list[NewItem]]:
    page: list[NewItem] = []
    num_bytes = 0
    for position, (_, line) in enumerate(_lines(path, max_bytes)):
        request = msgspec.json.decode(line, type=_Line)
        page.append(NewItem(position=position, custom_id=request.custom_id, body=bytes(request.body)))
        num_bytes += len(line)
        if len(page) >= _PAGE_LINES or num_bytes >= _PAGE_BYTES:
            yield page
            page, num_bytes = [], 0
    if page:
        yield page


def _problem(line: bytes, endpoint: str, seen: set[str], max_bytes: int) -> tuple[str, str, str | None] | None:
    """Code, message and field."""
    if len(line) > max_bytes:
        return "line_too_long", f"the line is longer than {max_bytes} bytes", None
    try:
        request = msgspec.json.decode(line, type=_Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return "invalid_json_line", f"the line is no request: {error}", None
    if not request.custom_id.isprintable():  # not every database takes any character
        return "invalid_custom_id", "custom_id has characters that cannot be printed", "custom_id"
    if request.custom_id in seen:
        return "duplicate_custom_id", "another line has the same custom_id", "custom_id"
    seen.add(request.custom_id)
    if request.method != "POST":
        return "invalid_method", f"method is {request.method[:20]!r}; it must be 'POST'", "method"
    if request.url != endpoint:
        return "url_mismatch", f"url is {request.url[:200]!r}; the batch's endpoint is {endpoint!r}", "url"
    try:
        body = msgspec.json.decode(request.body, type=_Body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return "invalid_request", f"body is no request: {error}", "body"
    if body.stream:
        return "invalid_request", "body.stream is true; answers of a batch come whole", "body.stream"
    return None


def _lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, but for blank ones, as long as those are not too many; of one that is too
    long, the beginning."""
    size = max_bytes + 2
    with open(path, "rb") as file:
        number = 0
        num_blank = 0
        while line := file.readline(size):
            number += 1
            rest = line
            while len(rest) == size and not rest.endswith(b"\n"):
                rest = file.readline(size)
            stripped = line.strip().removeprefix(b"\xef\xbb\xbf")
            num_blank += not stripped
            if stripped or num_blank > _MAX_BLANK_LINES:
                yield number, stripped


def _with_lines(job: Job, results: Sequence[ItemResult]) -> list[tuple[ItemResult, bytes]]:
    return [(result, _outcome_line(job, result)) for result in results]


def _outcome_line(job: Job, result: ItemResult) -> bytes:
    response = None
    if result.status_code is not None:
        response = _Response(
            status_code=result.status_code,
            request_id=result.request_id or "",
            body=msgspec.Raw(msgspec.json.format(result.body, indent=-1)),  # on one line, whatever it was
        )
    outcome = _Outcome(
        id=f"batch_req_{job.id.removeprefix('batch_')}_{result.position}",
        custom_id=result.custom_id,
        response=response,
        error=_UNANSWERED.get(result.state),
    )
    return msgspec.json.encode(outcome) + b"\n"
