"""`/v1/batches`: a file of requests, answered in a file when there is room for them."""

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from localmoe.core.errors import InvalidRequestError, NotFoundError
from localmoe.core.jobs import ENDED, Job, JobKind, JobState, JobStore
from localmoe.gateway.exchange import current_principal
from localmoe.gateway.fields import ApiModel, Metadata
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.gateway.jobs.file_routes import find_file
from localmoe.gateway.jobs.owners import ID_PATTERN, MAX_ID_CHARS, could_be_id, visible_owner
from localmoe.gateway.jobs.services import JobServices
from localmoe.gateway.openapi import ERROR_RESPONSES

_MIN_LIFETIME_S, _MAX_LIFETIME_S = 3600, 30 * 24 * 3600
_After = Annotated[
    str | None,
    Query(max_length=MAX_ID_CHARS, pattern=ID_PATTERN, description="Behind the batch of this id."),
]

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]


class OutputExpiresAfter(ApiModel):
    """When the files with the answers go."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=_MIN_LIFETIME_S, le=_MAX_LIFETIME_S)


class BatchRequest(ApiModel):
    """Asks for a batch."""

    EXAMPLE = {  # noqa: RUF012
        "input_file_id": "file-0123456789abcdef0123456789abcdef",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }

    input_file_id: str = Field(max_length=64, description="A file of purpose `batch`, a request per line.")
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: OutputExpiresAfter | None = None


class BatchError(BaseModel):
    """What is wrong with the file."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(BaseModel):
    """All of it, or the beginning."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """How far it has come."""

    total: int
    completed: int
    failed: int


class Batch(BaseModel):
    """One batch. Times are Unix times in seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """Some batches, the newest first."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def router(jobs: JobServices, config: JobsConfig) -> APIRouter:
    """The routes over these batches."""
    store, folder, runner = jobs.store, jobs.folder, jobs.runner
    routes = APIRouter(tags=["batches"], responses=ERROR_RESPONSES)

    @routes.post("/v1/batches", summary="Have a file of requests answered")
    async def create_batch(body: BatchRequest) -> Batch:
        file = await find_file(folder, body.input_file_id, param="input_file_id")
        if file.purpose != "batch":
            raise InvalidRequestError(
                f"input_file_id: the purpose of file {file.id} is {file.purpose!r}; it must be 'batch'",
                param="input_file_id",
            )
        now_s = time.time()
        lifetime = body.output_expires_after
        job = Job(
            id=f"batch_{uuid.uuid4().hex}",
            kind=JobKind.BATCH,
            owner=current_principal(),
            endpoint=body.endpoint,
            state=JobState.VALIDATING,
            created_at=now_s,
            expires_at=now_s + config.expire_after_s,
            num_bytes=file.num_bytes,
            input_file_id=file.id,
            output_lifetime_s=None if lifetime is None else lifetime.seconds,
            completion_window=body.completion_window,
            metadata=body.metadata,
        )
        await store.add(job, [], max_open=config.max_open_per_owner, max_open_bytes=config.max_owner_file_bytes)
        runner.wake()
        return _shown(job)

    @routes.get("/v1/batches", summary="List batches")
    async def list_batches(
        after: _After = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> BatchList:
        owner_id = visible_owner()
        found = await store.page(kind=JobKind.BATCH, owner_id=owner_id, after=after, limit=limit + 1)
        shown = [_shown(job) for job in found[:limit]]
        return BatchList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(found) > limit,
        )

    @routes.get("/v1/batches/{batch_id}", summary="Describe a batch")
    async def get_batch(batch_id: str) -> Batch:
        return _shown(await _find(store, batch_id))

    @routes.post("/v1/batches/{batch_id}/cancel", summary="End a batch early")
    async def cancel_batch(batch_id: str) -> Batch:
        job = await _find(store, batch_id)
        if job.state in ENDED:
            raise InvalidRequestError(f"batch {job.id} has ended already: it is {job.state}", param="batch_id")
        await store.cancel(job.id)
        runner.cancelled(job.id)
        return _shown(await _find(store, batch_id))

    return routes


async def _find(store: JobStore, batch_id: str) -> Job:
    owner_id = visible_owner()
    job = await store.get(batch_id, kind=JobKind.BATCH, owner_id=owner_id) if could_be_id(batch_id) else None
    if job is None:
        raise NotFoundError(f"there is no batch {batch_id[:100]!r}", param="batch_id")
    return job


def _shown(job: Job) -> Batch:
    def ended_at(state: JobState) -> int | None:
        return _whole(job.ended_at) if job.state is state else None

    errors = [BatchError(**vars(error)) for error in job.errors]
    return Batch(
        id=job.id,
        endpoint=job.endpoint,
        errors=BatchErrors(data=errors) if errors else None,
        input_file_id=job.input_file_id or "",
        completion_window=job.completion_window or "",
        status=JobState.FINALIZING if job.state is JobState.EXPIRING else job.state,
        output_file_id=job.output_file_id,
        error_file_id=job.error_file_id,
        created_at=int(job.created_at),
        in_progress_at=_whole(job.in_progress_at),
        expires_at=int(job.expires_at),
        finalizing_at=_whole(job.finalizing_at),
        completed_at=ended_at(JobState.COMPLETED),
        failed_at=ended_at(JobState.FAILED),
        expired_at=ended_at(JobState.EXPIRED),
        cancelling_at=_whole(job.cancelling_at),
        cancelled_at=ended_at(JobState.CANCELLED),
        request_counts=RequestCounts(total=job.num_items, completed=job.num_succeeded, failed=job.num_failed),
        metadata=job.metadata,
    )


def _whole(time_s: float | None) -> int | None:
    return None if time_s is None else int(time_s)
