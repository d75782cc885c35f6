"""Keeps answers that clients may ask for again, or go on from (`/v1/responses`)."""

import logging

from sqlalchemy import BigInteger, ColumnElement, and_, delete, func, insert, select

from localmoe.state.database import Database
from localmoe.state.schema import responses

logger = logging.getLogger(__name__)

_KEPT_SHARE = 0.9
"""What is left when an owner's responses have become too many; less than all, so that not each new one costs a look
at all of them."""


class SqlResponseStore:
    """Responses in the state database.

    Args:
        max_owner_bytes: of one owner's responses together; those changed longest ago go first. A larger one is not
            kept.
        keep_s: after this long without a change they go, too.
    """

    def __init__(self, database: Database, *, max_owner_bytes: int, keep_s: float) -> None:
        self._database = database
        self._max_owner_bytes = max_owner_bytes
        self._keep_s = keep_s

    async def put(self, owner: str, response_id: str, data: bytes) -> None:
        """See `ResponseStore.put`."""
        now, of_owner = self._database.now, responses.c.owner_id == owner
        async with self._database.write() as connection:
            await self._database.lock(connection, f"responses of {owner}")
            await connection.execute(delete(responses).where(_is(owner, response_id)))
            await connection.execute(delete(responses).where(responses.c.changed_at < now - self._keep_s))
            if len(data) > self._max_owner_bytes:
                logger.warning(
                    "response %s of %d bytes is not kept: state.max_owner_response_bytes is %d",
                    response_id,
                    len(data),
                    self._max_owner_bytes,
                )
                return
            await connection.execute(
                insert(responses).values(
                    owner_id=owner, id=response_id, data=data, num_bytes=len(data), changed_at=now
                )
            )
            total = func.sum(responses.c.num_bytes, type_=BigInteger)
            if (await connection.execute(select(total).where(of_owner))).scalar_one() > self._max_owner_bytes:
                newer = total.over(order_by=(responses.c.changed_at.desc(), responses.c.id)).label("newer_bytes")
                sizes = select(responses.c.id, newer).where(of_owner).subquery()
                too_many = select(sizes.c.id).where(
                    sizes.c.newer_bytes > int(_KEPT_SHARE * self._max_owner_bytes), sizes.c.id != response_id
                )
                await connection.execute(delete(responses).where(of_owner, responses.c.id.in_(too_many)))

    async def get(self, owner: str, response_id: str) -> bytes | None:
        """See `ResponseStore.get`."""
        async with self._database.read() as connection:
            found = await connection.execute(select(responses.c.data).where(_is(owner, response_id)))
            data: bytes | None = found.scalar()
        return data

    async def delete(self, owner: str, response_id: str) -> bool:
        """See `ResponseStore.delete`."""
        async with self._database.write() as connection:
            deleted = await connection.execute(delete(responses).where(_is(owner, response_id)))
            return deleted.rowcount == 1


def _is(owner: str, response_id: str) -> ColumnElement[bool]:
    return and_(responses.c.owner_id == owner, responses.c.id == response_id)
