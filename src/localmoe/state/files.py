"""Keeps what is known of files. See `core.jobs.FileStore`."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import Row, Select, delete, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from localmoe.core.errors import QuotaExceededError
from localmoe.core.jobs import FileQuery, FileRecord
from localmoe.state.database import Database
from localmoe.state.paging import read_page
from localmoe.state.schema import files

_MAX_EXPIRED = 1000
"""Forgotten at once."""
_MAX_OWNER_FILES = 100_000
"""Of one owner, so that empty ones are bounded, too."""


class SqlFileStore:
    """Files in the state database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: FileRecord, *, max_owner_bytes: int) -> None:
        """See `FileStore.add`."""
        async with self._database.write() as connection:
            await self._database.lock(connection, f"files of {record.owner_id}")
            held_bytes = await _num_bytes(connection, record.owner_id)
            of_owner = select(func.count()).select_from(files).where(files.c.owner_id == record.owner_id)
            if (await connection.execute(of_owner)).scalar_one() >= _MAX_OWNER_FILES:
                raise QuotaExceededError(f"you keep {_MAX_OWNER_FILES} files here already; delete some first")
            if held_bytes + record.num_bytes > max_owner_bytes:
                raise QuotaExceededError(
                    f"the file's {record.num_bytes} bytes and the {held_bytes} of your other files are more than the "
                    f"{max_owner_bytes} that you may keep here; delete some first"
                )
            await insert_file(connection, record)

    async def get(self, file_id: str, *, owner_id: str | None) -> FileRecord | None:
        """See `FileStore.get`."""
        async with self._database.read() as connection:
            row = (await connection.execute(self._select(owner_id).where(files.c.id == file_id))).first()
        return None if row is None else _record(row)

    async def page(self, query: FileQuery) -> list[FileRecord]:
        """See `FileStore.page`."""
        statement = self._select(query.owner_id)
        if query.purpose is not None:
            statement = statement.where(files.c.purpose == query.purpose)
        async with self._database.read() as connection:
            rows = await read_page(
                connection,
                statement,
                files,
                after=query.after,
                newest_first=query.newest_first,
                limit=query.limit,
            )
        return [_record(row) for row in rows]

    async def delete(self, file_id: str) -> None:
        """See `FileStore.delete`."""
        async with self._database.write() as connection:
            await connection.execute(delete(files).where(files.c.id == file_id))

    async def num_bytes(self, owner_id: str) -> int:
        """See `FileStore.num_bytes`."""
        async with self._database.read() as connection:
            return await _num_bytes(connection, owner_id)

    async def delete_expired(self) -> list[str]:
        """See `FileStore.delete_expired`."""
        expired = select(files.c.id).where(files.c.expires_at <= self._database.now).limit(_MAX_EXPIRED)
        async with self._database.write() as connection:
            ids = list((await connection.execute(expired)).scalars())
            if ids:
                await connection.execute(delete(files).where(files.c.id.in_(ids)))
        return ids

    async def known(self, file_ids: Collection[str]) -> set[str]:
        """See `FileStore.known`."""
        async with self._database.read() as connection:
            return set((await connection.execute(select(files.c.id).where(files.c.id.in_(file_ids)))).scalars())

    def _select(self, owner_id: str | None) -> Select[Any]:
        unexpired = or_(files.c.expires_at.is_(None), files.c.expires_at > self._database.now)
        statement = select(files).where(unexpired)
        return statement if owner_id is None else statement.where(files.c.owner_id == owner_id)


async def insert_file(connection: AsyncConnection, record: FileRecord) -> None:
    """Keep a record, whatever others there are."""
    await connection.execute(
        insert(files).values({column.name: getattr(record, column.name) for column in files.columns})
    )


async def _num_bytes(connection: AsyncConnection, owner_id: str) -> int:
    total = select(func.coalesce(func.sum(files.c.num_bytes), 0)).where(files.c.owner_id == owner_id)
    return int((await connection.execute(total)).scalar_one())


def _record(row: Row[Any]) -> FileRecord:
    return FileRecord(**row._mapping)
