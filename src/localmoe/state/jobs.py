"""Keeps jobs. See `core.jobs.JobStore`; what runs them uses `job_work`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from localmoe.core.errors import QuotaExceededError
from localmoe.core.identity import Principal
from localmoe.core.jobs import (
    ENDED,
    ItemResult,
    ItemState,
    Job,
    JobKind,
    JobState,
    LineError,
    NewItem,
)
from localmoe.state.database import Database
from localmoe.state.paging import read_page
from localmoe.state.schema import job_items, jobs

_JSON_COLUMNS = {"owner": "owner", "metadata": "metadata_json", "errors": "errors_json"}


class SqlJobStore:
    """Jobs in the state database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, job: Job, items: Sequence[NewItem], *, max_open: int, max_open_bytes: int) -> None:
        """See `JobStore.add`."""
        open_ones = select(func.count(), func.coalesce(func.sum(jobs.c.num_bytes), 0)).where(
            jobs.c.owner_id == job.owner.id, jobs.c.ended_at.is_(None)
        )
        async with self._database.write() as connection:
            await self._database.lock(connection, f"jobs of {job.owner.id}")
            num_open, open_bytes = (await connection.execute(open_ones)).one()
            if num_open >= max_open:
                raise QuotaExceededError(
                    f"{num_open} of your jobs and batches have not ended; {max_open} may be open at once"
                )
            if open_bytes + job.num_bytes > max_open_bytes:
                raise QuotaExceededError(
                    f"the requests of your jobs and batches that have not ended would take "
                    f"{open_bytes + job.num_bytes} bytes with this; {max_open_bytes} may be kept at once"
                )
            await connection.execute(insert(jobs).values(_row(job)))
            await insert_items(connection, self._database, job.id, flow_of(job), items)

    async def get(self, job_id: str, *, kind: JobKind, owner_id: str | None) -> Job | None:
        """See `JobStore.get`."""
        statement = select(jobs).where(jobs.c.id == job_id, jobs.c.kind == kind)
        if owner_id is not None:
            statement = statement.where(jobs.c.owner_id == owner_id)
        async with self._database.read() as connection:
            row = (await connection.execute(statement)).first()
        return None if row is None else job_of(row)

    async def page(self, *, kind: JobKind, owner_id: str | None, after: str | None, limit: int) -> list[Job]:
        """See `JobStore.page`."""
        visible = select(jobs).where(jobs.c.kind == kind)
        if owner_id is not None:
            visible = visible.where(jobs.c.owner_id == owner_id)
        async with self._database.read() as connection:
            rows = await read_page(connection, visible, jobs, after=after, limit=limit)
        return [job_of(row) for row in rows]

    async def result(self, job_id: str) -> ItemResult | None:
        """See `JobStore.result`."""
        async with self._database.read() as connection:
            row = (await connection.execute(select_results(job_id).limit(1))).first()
        return None if row is None else result_of(row)

    async def cancel(self, job_id: str) -> None:
        """See `JobStore.cancel`."""
        async with self._database.write() as connection:
            await end_open(connection, job_id, self._database, because=ItemState.CANCELLED)

    async def delete(self, job_id: str) -> None:
        """See `JobStore.delete`."""
        async with self._database.write() as connection:
            await connection.execute(delete(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(ENDED)))


async def insert_items(
    connection: AsyncConnection, database: Database, job_id: str, flow: str, items: Sequence[NewItem]
) -> None:
    """Add items so that flows take turns: the first comes when others' first would, each further one a turn later,
    and none before those that its own flow has waiting (start-time fair queueing, Goyal et al., 1997)."""
    if not items:
        return
    queued = job_items.c.state == ItemState.QUEUED
    own_last = select(func.max(job_items.c.turn)).where(queued, job_items.c.flow == flow)
    first = max(
        await current_turn(connection, database),
        1 + ((await connection.execute(own_last)).scalar() or 0),
    )
    await connection.execute(
        insert(job_items),
        [
            {
                "job_id": job_id,
                "position": item.position,
                "custom_id": item.custom_id,
                "body": item.body,
                "state": ItemState.QUEUED,
                "flow": flow,
                "turn": first + place,
                "due_at": 0.0,
                "num_starts": 0,
                "num_refusals": 0,
                "num_not_served": 0,
            }
            for place, item in enumerate(items)
        ],
    )


async def current_turn(connection: AsyncConnection, database: Database) -> int:
    """Of the items that run, or else of those that could, or else of those that wait to be tried again."""
    turn, queued = job_items.c.turn, job_items.c.state == ItemState.QUEUED
    for statement in (
        select(func.max(turn)).where(job_items.c.state == ItemState.RUNNING),
        select(func.min(turn)).where(queued, job_items.c.due_at <= database.now),
        select(func.min(turn)).where(queued),
    ):
        found = (await connection.execute(statement)).scalar()
        if found is not None:
            return int(found)
    return 0


async def end_open(connection: AsyncConnection, job_id: str, database: Database, *, because: ItemState) -> None:
    """End a job that is still being read or run, and its items that have not ended, as cancelled or expired. A batch
    then has its answers written."""
    cancelled = because is ItemState.CANCELLED
    running = jobs.c.state.in_([JobState.VALIDATING, JobState.IN_PROGRESS])
    statement = select(jobs.c.kind).where(jobs.c.id == job_id, running).with_for_update()
    kind = (await connection.execute(statement)).scalar()
    if kind is None:
        return
    values: dict[str, Any] = {"lease_owner": None, "lease_until": None}
    if cancelled:
        values["cancelling_at"] = database.now
    if kind == JobKind.BATCH:
        state = JobState.CANCELLING if cancelled else JobState.EXPIRING
        values["finalizing_at"] = database.now
    else:
        state = JobState.CANCELLED if cancelled else JobState.EXPIRED
        values |= {"ended_at": database.now, "num_bytes": 0}
    await connection.execute(update(jobs).where(jobs.c.id == job_id).values(state=state, **values))
    await connection.execute(
        update(job_items)
        .where(job_items.c.job_id == job_id, job_items.c.state.in_([ItemState.QUEUED, ItemState.RUNNING]))
        .values(state=because, lease_owner=None, lease_until=None, body=b"")
    )


def flow_of(job: Job) -> str:
    """Whose items take turns with others': an owner's batches among themselves wait for each other, not for
    others'."""
    return f"{job.kind}/{job.owner.id}"


def select_results(job_id: str) -> Any:
    """The items of a job in order, without what they asked."""
    columns = (
        job_items.c.position,
        job_items.c.custom_id,
        job_items.c.state,
        job_items.c.status_code,
        job_items.c.request_id,
        job_items.c.result,
    )
    return select(*columns).where(job_items.c.job_id == job_id).order_by(job_items.c.position)


def result_of(row: Row[Any]) -> ItemResult:
    """An item as selected by `select_results`."""
    values = dict(row._mapping)
    return ItemResult(body=values.pop("result") or b"", state=ItemState(values.pop("state")), **values)


def job_of(row: Row[Any]) -> Job:
    """A row of `jobs`."""
    values = dict(row._mapping)
    del values["owner_id"], values["lease_owner"], values["lease_until"]
    errors, described = values.pop("errors_json"), values.pop("metadata_json")
    values |= {
        "kind": JobKind(values["kind"]),
        "state": JobState(values["state"]),
        "owner": principal_of(values["owner"]),
        "errors": () if errors is None else msgspec.json.decode(errors, type=tuple[LineError, ...]),
        "metadata": None if described is None else msgspec.json.decode(described, type=dict[str, str]),
    }
    return Job(**values)


def principal_of(data: bytes) -> Principal:
    """An owner as a row holds it."""
    return msgspec.json.decode(data, type=Principal)


def _row(job: Job) -> dict[str, Any]:
    values = {name: value for name, value in vars(job).items() if name not in _JSON_COLUMNS}
    return values | {
        "owner_id": job.owner.id,
        "owner": msgspec.json.encode(job.owner),
        "metadata_json": None if job.metadata is None else msgspec.json.encode(job.metadata),
        "errors_json": errors_json(job.errors),
    }


def errors_json(errors: Sequence[LineError]) -> bytes | None:
    """Errors as a row holds them."""
    return msgspec.json.encode([asdict(error) for error in errors]) if errors else None
