"""Keeps API keys. See `core.keys.KeyStore`."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Row, Update, bindparam, case, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from localmoe.core.errors import ConflictError
from localmoe.core.identity import RateLimits, Role
from localmoe.core.keys import KeyRecord
from localmoe.state.database import Database
from localmoe.state.schema import api_keys

_JSON_COLUMNS = ("models", "limits")


class SqlKeyStore:
    """API keys in the state database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: KeyRecord) -> None:
        """See `KeyStore.add`."""
        async with self._database.write() as connection:
            await self._insert(connection, record)

    async def replace(self, old: KeyRecord, record: KeyRecord, *, until_s: float) -> bool:
        """See `KeyStore.replace`."""
        as_it_was = api_keys.c.revoked_s.is_not_distinct_from(old.revoked_s)
        async with self._database.write() as connection:
            ended = await connection.execute(_revocation(old.id, until_s).where(as_it_was))
            if ended.rowcount != 1:
                return False
            await self._insert(connection, record)
        return True

    async def _insert(self, connection: AsyncConnection, record: KeyRecord) -> None:
        values = {column.name: getattr(record, column.name) for column in api_keys.columns}
        values |= {name: msgspec.json.encode(values[name]) for name in _JSON_COLUMNS}
        same = select(api_keys.c.id).where(or_(api_keys.c.id == record.id, api_keys.c.digest == record.digest))
        await self._database.lock(connection, "api keys")
        if (await connection.execute(same)).first() is not None:
            raise ConflictError(f"there is an API key {record.id} already")
        await connection.execute(insert(api_keys).values(values))

    async def find(self, digest: bytes) -> KeyRecord | None:
        """See `KeyStore.find`."""
        async with self._database.read() as connection:
            row = (await connection.execute(select(api_keys).where(api_keys.c.digest == digest))).first()
        return None if row is None else _record(row)

    async def all(self) -> Sequence[KeyRecord]:
        """See `KeyStore.all`."""
        async with self._database.read() as connection:
            rows = await connection.execute(select(api_keys).order_by(api_keys.c.created_s, api_keys.c.id))
            return [_record(row) for row in rows]

    async def revoke(self, key_id: str, *, at_s: float) -> bool:
        """See `KeyStore.revoke`."""
        async with self._database.write() as connection:
            found = await connection.execute(_revocation(key_id, at_s))
            return found.rowcount == 1

    async def touch(self, used_s: Mapping[str, float]) -> None:
        """See `KeyStore.touch`."""
        if not used_s:
            return
        last = api_keys.c.last_used_s
        statement = (
            update(api_keys)
            .where(api_keys.c.id == bindparam("key_id"), or_(last.is_(None), last < bindparam("time_s")))
            .values(last_used_s=bindparam("time_s"))
        )
        async with self._database.write() as connection:
            await connection.execute(
                statement, [{"key_id": key_id, "time_s": time_s} for key_id, time_s in sorted(used_s.items())]
            )


def _revocation(key_id: str, at_s: float) -> Update:
    """From then on, or from when it was revoked already if that is earlier."""
    revoked_s = api_keys.c.revoked_s
    earlier = case((revoked_s < at_s, revoked_s), else_=at_s)
    return update(api_keys).where(api_keys.c.id == key_id).values(revoked_s=earlier)


def _record(row: Row[Any]) -> KeyRecord:
    values = dict(row._mapping)
    values["role"] = Role(values["role"])
    values["models"] = msgspec.json.decode(values["models"], type=tuple[str, ...])
    values["limits"] = msgspec.json.decode(values["limits"], type=RateLimits)
    return KeyRecord(**values)
