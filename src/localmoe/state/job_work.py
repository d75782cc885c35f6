"""Jobs as those who run them see them. See `core.jobs.JobWork`.

Every step that matters names its lease in the WHERE clause and looks at what was changed, so whoever has lost a lease
changes nothing. A job's row is locked before its items' rows, always in this order.
"""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    and_,
    case,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from localmoe.core.jobs import (
    FileRecord,
    ItemLease,
    ItemResult,
    ItemState,
    Job,
    JobKind,
    JobState,
    LeasedItem,
    LineError,
    NewItem,
    Setback,
)
from localmoe.state.database import Database
from localmoe.state.files import insert_file
from localmoe.state.jobs import (
    current_turn,
    end_open,
    errors_json,
    flow_of,
    insert_items,
    job_of,
    principal_of,
    result_of,
    select_results,
)
from localmoe.state.schema import api_keys, job_items, jobs

_TO_DO = (JobState.VALIDATING, JobState.FINALIZING, JobState.CANCELLING, JobState.EXPIRING)
_ENDS = {
    JobState.FINALIZING: JobState.COMPLETED,
    JobState.CANCELLING: JobState.CANCELLED,
    JobState.EXPIRING: JobState.EXPIRED,
}
_MAX_INTERRUPTIONS = 5
"""An item during which the server or an engine died so often may be the reason."""
_GRACE_S = 2.0
"""Within which runners that have nothing to do have looked for something."""
_AT_ONCE = 500
"""Rows that one look after things takes up; the next takes more."""
_GIVEN_UP = (
    b'{"error":{"message":"the server or its engine ended several times while it worked on this request, which is '
    b'not tried again",'
    b'"type":"server_error","param":null,"code":"interrupted"}}'
)


class SqlJobWork:
    """Jobs in the state database, for runners."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def lease_items(self, runner: str, *, limit: int, lease_s: float) -> list[LeasedItem]:
        """See `JobWork.lease_items`."""
        now = self._database.now
        async with self._database.write() as connection:
            rows = (await connection.execute(_next_items(runner, limit, now))).all()
            if not rows:
                return []
            keys = [(row.job_id, row.position) for row in rows]
            await connection.execute(
                update(job_items)
                .where(tuple_(job_items.c.job_id, job_items.c.position).in_(keys))
                .values(
                    state=ItemState.RUNNING,
                    num_starts=job_items.c.num_starts + 1,
                    lease_owner=runner,
                    lease_until=now + lease_s,
                )
            )
        return [
            LeasedItem(
                job_id=row.job_id,
                position=row.position,
                num_starts=row.num_starts + 1,
                num_not_served=row.num_not_served,
                others_run=bool(row.others_run),
                owner=principal_of(row.owner),
                may_ask=bool(row.may_ask),
                endpoint=row.endpoint,
                body=row.body,
                time_left_s=row.time_left_s,
            )
            for row in rows
        ]

    async def finish(self, item: LeasedItem, result: ItemResult, *, runner: str) -> bool:
        """See `JobWork.finish`."""
        async with self._database.write() as connection:
            await self._lock_job(connection, item.job_id)
            return await self._record(connection, item.job_id, _held(item, runner), result)

    async def put_back(self, item: LeasedItem, *, runner: str, delay_s: float, because: Setback) -> None:
        """See `JobWork.put_back`."""
        held = _held(item, runner)
        num_not_served, not_served_by = job_items.c.num_not_served, job_items.c.not_served_by
        if because is Setback.NOT_SERVED:
            served = {"num_not_served": num_not_served + 1, "not_served_by": runner}
        else:  # who has asked serves it, and others need not look again
            others = case((not_served_by == runner, None), else_=not_served_by)
            served = {"num_not_served": 0, "not_served_by": others}
        async with self._database.write() as connection:
            if because is Setback.INTERRUPTED:
                await self._give_up(connection, held, uncounted=0)
            await connection.execute(
                update(job_items)
                .where(held)
                .values(
                    state=ItemState.QUEUED,
                    turn=await current_turn(connection, self._database),  # or it would hold the turn up
                    num_refusals=job_items.c.num_refusals + int(because is not Setback.INTERRUPTED),
                    **served,
                    due_at=self._database.now + delay_s,
                    lease_owner=None,
                    lease_until=None,
                )
            )

    async def renew(
        self, runner: str, *, items: Collection[ItemLease], job_ids: Collection[str], lease_s: float
    ) -> set[ItemLease]:
        """See `JobWork.renew`."""
        until = self._database.now + lease_s
        my_jobs, my_items = jobs.c.lease_owner == runner, job_items.c.lease_owner == runner
        held = select(job_items.c.job_id, job_items.c.position, job_items.c.num_starts).where(my_items)
        async with self._database.write() as connection:
            found = {(row.job_id, row.position, row.num_starts) for row in await connection.execute(held)}
            unknown = [(job_id, position) for job_id, position, _ in found.difference(items)]
            await self._free(
                connection,
                and_(my_jobs, jobs.c.id.not_in(job_ids)),
                and_(my_items, tuple_(job_items.c.job_id, job_items.c.position).in_(unknown)),
                uncounted=0,
            )
            await connection.execute(update(jobs).where(my_jobs).values(lease_until=until))
            await connection.execute(update(job_items).where(my_items).values(lease_until=until))
        return found.intersection(items)

    async def release(self, runner: str, *, interrupted: bool) -> None:
        """See `JobWork.release`."""
        mine = jobs.c.lease_owner == runner, job_items.c.lease_owner == runner
        async with self._database.write() as connection:
            await self._free(connection, *mine, uncounted=0 if interrupted else 1)

    async def look_after(self, *, keep_ended_s: float, max_owner_bytes: int) -> None:
        """See `JobWork.look_after`."""
        now = self._database.now
        # With their states, by which they are found without a look at all there are.
        lapsed_job = and_(jobs.c.state.in_(_TO_DO), jobs.c.lease_owner.is_not(None), jobs.c.lease_until < now)
        lapsed_item = and_(job_items.c.state == ItemState.RUNNING, job_items.c.lease_until < now)
        over = and_(jobs.c.state.in_([JobState.VALIDATING, JobState.IN_PROGRESS]), jobs.c.expires_at <= now)
        old = jobs.c.ended_at < now - keep_ended_s
        async with self._database.read() as connection:
            has_lapsed = [
                (await connection.execute(select(column).where(condition).limit(1))).first() is not None
                for column, condition in ((jobs.c.id, lapsed_job), (job_items.c.job_id, lapsed_item))
            ]
            over_ids = (await connection.execute(select(jobs.c.id).where(over).limit(_AT_ONCE))).scalars().all()
            old_ids = (await connection.execute(select(jobs.c.id).where(old).limit(_AT_ONCE))).scalars().all()
        if any(has_lapsed):
            async with self._database.write() as connection:
                await self._free(connection, lapsed_job, lapsed_item, uncounted=0)
        for job_id in over_ids:
            async with self._database.write() as connection:
                await end_open(connection, job_id, self._database, because=ItemState.EXPIRED)
        if old_ids:
            async with self._database.write() as connection:
                await connection.execute(delete(jobs).where(jobs.c.id.in_(old_ids)))
        await self._forget_beyond(max_owner_bytes)

    async def _forget_beyond(self, max_owner_bytes: int) -> None:
        """Of results that take more than this together, forget the oldest; an owner's latest is kept in any case."""
        num_bytes = func.sum(jobs.c.num_bytes, type_=BigInteger)
        ended = and_(jobs.c.kind == JobKind.INFERENCE, jobs.c.ended_at.is_not(None))
        owners = select(jobs.c.owner_id).where(ended).group_by(jobs.c.owner_id).having(num_bytes > max_owner_bytes)
        kept = num_bytes.over(order_by=(jobs.c.ended_at.desc(), jobs.c.id)).label("kept")
        async with self._database.read() as connection:
            owner_ids = (await connection.execute(owners)).scalars().all()
        for owner_id in owner_ids:
            sizes = select(jobs.c.id, jobs.c.num_bytes, kept).where(ended, jobs.c.owner_id == owner_id).subquery()
            too_many = sizes.c.kept > max_owner_bytes, sizes.c.kept > sizes.c.num_bytes
            async with self._database.write() as connection:
                ids = (
                    (await connection.execute(select(sizes.c.id).where(*too_many).limit(_AT_ONCE))).scalars().all()
                )
                await connection.execute(delete(jobs).where(jobs.c.id.in_(ids)))

    async def lease_job(self, runner: str, *, lease_s: float) -> Job | None:
        """See `JobWork.lease_job`."""
        now = self._database.now
        is_due = or_(jobs.c.lease_until.is_(None), jobs.c.lease_until <= now)
        free = and_(jobs.c.state.in_(_TO_DO), jobs.c.lease_owner.is_(None), is_due)
        async with self._database.read() as connection:
            if (await connection.execute(select(jobs.c.id).where(free).limit(1))).first() is None:
                return None
        async with self._database.write() as connection:
            first = select(jobs).where(free).order_by(jobs.c.created_at).limit(1)
            row = (await connection.execute(first.with_for_update(skip_locked=True))).first()
            if row is None:
                return None
            lease = {"lease_owner": runner, "lease_until": now + lease_s}
            await connection.execute(update(jobs).where(jobs.c.id == row.id).values(lease))
        return job_of(row)

    async def give_back(self, job_id: str, *, runner: str, delay_s: float) -> None:
        """See `JobWork.give_back`."""
        mine = and_(jobs.c.id == job_id, jobs.c.lease_owner == runner)
        later = {"lease_owner": None, "lease_until": self._database.now + delay_s}
        async with self._database.write() as connection:
            await connection.execute(update(jobs).where(mine).values(later))

    async def add_items(self, job_id: str, items: Sequence[NewItem], *, runner: str) -> bool:
        """See `JobWork.add_items`."""
        reading = and_(jobs.c.id == job_id, jobs.c.lease_owner == runner, jobs.c.state == JobState.VALIDATING)
        last = select(func.max(job_items.c.position)).where(job_items.c.job_id == job_id)
        async with self._database.write() as connection:
            row = (await connection.execute(select(jobs).where(reading).with_for_update())).first()
            if row is None:
                return False
            num_there = 1 + await _scalar(connection, last, default=-1)
            new = [item for item in items if item.position >= num_there]
            await insert_items(connection, self._database, job_id, flow_of(job_of(row)), new)
        return True

    async def begin(self, job_id: str, *, num_items: int, runner: str) -> None:
        """See `JobWork.begin`."""
        values = {
            "state": JobState.IN_PROGRESS,
            "in_progress_at": self._database.now,
            "num_items": num_items,
            "lease_owner": None,
            "lease_until": None,
        }
        reading = and_(jobs.c.id == job_id, jobs.c.lease_owner == runner, jobs.c.state == JobState.VALIDATING)
        async with self._database.write() as connection:
            await connection.execute(update(jobs).where(reading).values(values))
            await self._count(connection, job_id, succeeded=0, failed=0)

    async def reject(self, job_id: str, errors: Sequence[LineError], *, runner: str) -> None:
        """See `JobWork.reject`."""
        reading = and_(jobs.c.id == job_id, jobs.c.lease_owner == runner, jobs.c.state == JobState.VALIDATING)
        values = {
            "state": JobState.FAILED,
            "ended_at": self._database.now,
            "errors_json": errors_json(errors),
            "lease_owner": None,
            "lease_until": None,
        }
        async with self._database.write() as connection:
            rejected = await connection.execute(update(jobs).where(reading).values(values))
            if rejected.rowcount == 1:  # some may be there already
                await connection.execute(delete(job_items).where(job_items.c.job_id == job_id))

    async def results(self, job_id: str, *, after: int, limit: int) -> list[ItemResult]:
        """See `JobWork.results`."""
        statement = select_results(job_id).where(job_items.c.position > after).limit(limit)
        async with self._database.read() as connection:
            return [result_of(row) for row in await connection.execute(statement)]

    async def close(
        self, job_id: str, *, output: FileRecord | None, errors: FileRecord | None, runner: str
    ) -> bool:
        """See `JobWork.close`."""
        end = case({state.value: end.value for state, end in _ENDS.items()}, value=jobs.c.state)
        held = and_(jobs.c.id == job_id, jobs.c.lease_owner == runner, jobs.c.state.in_(_ENDS))
        async with self._database.write() as connection:
            closed = await connection.execute(
                update(jobs)
                .where(held)
                .values(
                    state=end,
                    ended_at=self._database.now,
                    output_file_id=output.id if output else None,
                    error_file_id=errors.id if errors else None,
                    lease_owner=None,
                    lease_until=None,
                )
            )
            if closed.rowcount != 1:
                return False
            for record in (output, errors):
                if record is not None:
                    await insert_file(connection, record)
            await connection.execute(delete(job_items).where(job_items.c.job_id == job_id))
        return True

    async def _record(
        self, connection: AsyncConnection, job_id: str, held: ColumnElement[bool], result: ItemResult
    ) -> bool:
        ended = await connection.execute(
            update(job_items)
            .where(held)
            .values(
                state=result.state,
                status_code=result.status_code,
                request_id=result.request_id,
                result=result.body,
                body=b"",
                lease_owner=None,
                lease_until=None,
            )
        )
        if ended.rowcount != 1:
            return False
        succeeded = int(result.state is ItemState.SUCCEEDED)
        await self._count(
            connection, job_id, succeeded=succeeded, failed=1 - succeeded, num_bytes=len(result.body)
        )
        return True

    async def _count(
        self, connection: AsyncConnection, job_id: str, *, succeeded: int, failed: int, num_bytes: int = 0
    ) -> None:
        """Count items that have ended, and end a job that has no others, of which so many bytes are kept then; of a
        batch, begin with it."""
        num_succeeded, num_failed = jobs.c.num_succeeded + succeeded, jobs.c.num_failed + failed
        done = and_(jobs.c.state == JobState.IN_PROGRESS, num_succeeded + num_failed >= jobs.c.num_items)
        batch_done = and_(done, jobs.c.kind == JobKind.BATCH)
        single_done = and_(done, jobs.c.kind == JobKind.INFERENCE)
        now = self._database.now
        await connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id)
            .values(
                num_succeeded=num_succeeded,
                num_failed=num_failed,
                state=case(
                    (batch_done, JobState.FINALIZING.value),
                    (and_(single_done, num_failed > 0), JobState.FAILED.value),
                    (single_done, JobState.COMPLETED.value),
                    else_=jobs.c.state,
                ),
                num_bytes=case((single_done, num_bytes), else_=jobs.c.num_bytes),
                finalizing_at=case((batch_done, now), else_=jobs.c.finalizing_at),
                ended_at=case((single_done, now), else_=jobs.c.ended_at),
            )
        )

    async def _lock_job(self, connection: AsyncConnection, job_id: str) -> None:
        if self._database.has_row_locks:
            await connection.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())

    async def _free(
        self,
        connection: AsyncConnection,
        of_jobs: ColumnElement[bool],
        of_items: ColumnElement[bool],
        *,
        uncounted: int,
    ) -> None:
        """Give back leases; an item that was begun too often is given up.

        Args:
            uncounted: starts that were no fault of the item.
        """
        no_lease = {"lease_owner": None, "lease_until": None}
        await connection.execute(update(jobs).where(of_jobs).values(no_lease))
        await self._give_up(connection, of_items, uncounted=uncounted)
        await connection.execute(
            update(job_items)
            .where(of_items)
            .values(state=ItemState.QUEUED, num_starts=job_items.c.num_starts - uncounted, **no_lease)
        )

    async def _give_up(
        self, connection: AsyncConnection, of_items: ColumnElement[bool], *, uncounted: int
    ) -> None:
        """End those of these items that were interrupted too often; see `_free`."""
        num_interrupted = job_items.c.num_starts - job_items.c.num_refusals - uncounted
        too_often = and_(of_items, num_interrupted >= _MAX_INTERRUPTIONS)
        keys = select(job_items.c.job_id, job_items.c.position).where(too_often)
        for job_id, position in (await connection.execute(keys)).all():
            await self._lock_job(connection, job_id)
            key = and_(too_often, job_items.c.job_id == job_id, job_items.c.position == position)
            given_up = ItemResult(
                position=position, custom_id=None, state=ItemState.FAILED, status_code=500, body=_GIVEN_UP
            )
            await self._record(connection, job_id, key, given_up)


def _next_items(runner: str, limit: int, now: ColumnElement[float]) -> Select[Any]:
    """Items that a runner may take, those whose turn it is first; they are locked for it."""
    others = job_items.alias()
    others_run = exists().where(
        others.c.state == ItemState.RUNNING, others.c.lease_owner != runner, others.c.lease_until > now
    )
    # Whoever does not serve its model leaves it to others: those at work, or those that have time and look.
    by_us_again = and_(~others_run, job_items.c.due_at <= now - _GRACE_S)
    not_served_by = job_items.c.not_served_by
    ready = and_(
        job_items.c.state == ItemState.QUEUED,
        job_items.c.due_at <= now,
        or_(not_served_by.is_(None), not_served_by != runner, by_us_again),
    )
    return (
        select(
            job_items,
            jobs.c.owner,
            jobs.c.endpoint,
            (jobs.c.expires_at - now).label("time_left_s"),
            _may_ask(now).label("may_ask"),
            others_run.label("others_run"),
        )
        .join(jobs, jobs.c.id == job_items.c.job_id)
        .where(ready)
        .order_by(job_items.c.turn)
        .limit(limit)
        .with_for_update(of=job_items, skip_locked=True)
    )


def _held(item: LeasedItem, runner: str) -> ColumnElement[bool]:
    return and_(
        job_items.c.job_id == item.job_id,
        job_items.c.position == item.position,
        job_items.c.state == ItemState.RUNNING,
        job_items.c.lease_owner == runner,
        job_items.c.num_starts == item.num_starts,
    )


def _may_ask(now: ColumnElement[float]) -> ColumnElement[bool]:
    """Whether a job's owner still may, who had API keys or never had any; see `KeyRecord.is_valid`."""
    of_owner = api_keys.c.principal_id == jobs.c.owner_id
    valid = [or_(end.is_(None), end > now) for end in (api_keys.c.expires_s, api_keys.c.revoked_s)]
    has_key = exists().where(of_owner).correlate(jobs)
    return or_(~has_key, exists().where(of_owner, *valid).correlate(jobs))


async def _scalar(connection: AsyncConnection, statement: Any, *, default: int) -> int:
    value = (await connection.execute(statement)).scalar()
    return default if value is None else int(value)
