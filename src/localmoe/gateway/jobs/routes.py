"""`/v1/jobs`: what became of requests that are answered later."""

from typing import Any, Literal

import msgspec
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from localmoe.core.errors import NotFoundError
from localmoe.core.jobs import ENDED, ItemState, Job, JobKind, JobState, JobStore
from localmoe.gateway.jobs.owners import could_be_id, visible_owner
from localmoe.gateway.jobs.services import JobServices
from localmoe.gateway.openapi import ERROR_RESPONSES

JobStatus = Literal["queued", "running", "completed", "failed", "cancelled", "expired"]


class JobProgress(BaseModel):
    """How far it has come."""

    total: int
    completed: int
    failed: int


class JobObject(BaseModel):
    """One job. Times are Unix times in seconds."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    endpoint: str
    created_at: int
    expires_at: int
    ended_at: int | None
    progress: JobProgress
    result: dict[str, Any] | None
    """What the endpoint answered, once it is completed."""
    error: dict[str, Any] | None
    """Likewise, once it has failed."""


class _Answer(msgspec.Struct):
    error: msgspec.Raw = msgspec.Raw(b"null")


class JobDeleted(BaseModel):
    """It is there no more."""

    id: str
    object: Literal["job"] = "job"
    deleted: Literal[True] = True


def router(jobs: JobServices) -> APIRouter:
    """The routes over these jobs."""
    store, runner = jobs.store, jobs.runner
    routes = APIRouter(tags=["jobs"], responses=ERROR_RESPONSES)

    @routes.get(
        "/v1/jobs/{job_id}",
        summary="Describe a job, and its result once it has ended",
        response_model=JobObject,
    )
    async def get_job(job_id: str) -> Response:
        return await _shown(store, await _find(store, job_id))

    @routes.delete(
        "/v1/jobs/{job_id}",
        summary="Cancel a job; delete one that has ended",
        response_model=JobObject | JobDeleted,
    )
    async def delete_job(job_id: str) -> Response | JobDeleted:
        job = await _find(store, job_id)
        if job.state in ENDED:
            await store.delete(job.id)
            return JobDeleted(id=job.id)
        await store.cancel(job.id)
        runner.cancelled(job.id)
        return await _shown(store, await _find(store, job_id))

    return routes


async def _find(store: JobStore, job_id: str) -> Job:
    owner_id = visible_owner()
    job = await store.get(job_id, kind=JobKind.INFERENCE, owner_id=owner_id) if could_be_id(job_id) else None
    if job is None:
        raise NotFoundError(f"there is no job {job_id[:100]!r}", param="job_id")
    return job


async def _shown(store: JobStore, job: Job) -> Response:
    item = await store.result(job.id)
    status: Any = job.state.value
    if job.state is JobState.IN_PROGRESS:
        status = "queued" if item is None or item.state is ItemState.QUEUED else "running"
    shown = JobObject(
        id=job.id,
        status=status,
        endpoint=job.endpoint,
        created_at=int(job.created_at),
        expires_at=int(job.expires_at),
        ended_at=None if job.ended_at is None else int(job.ended_at),
        progress=JobProgress(total=job.num_items, completed=job.num_succeeded, failed=job.num_failed),
        result=None,
        error=None,
    ).model_dump()
    # What the endpoint answered may be long, and goes out as it is.
    if item is not None and item.body and job.state is JobState.COMPLETED:
        shown["result"] = msgspec.Raw(item.body)
    elif item is not None and item.body and job.state is JobState.FAILED:
        shown["error"] = msgspec.json.decode(item.body, type=_Answer).error
    return Response(msgspec.json.encode(shown), media_type="application/json")
