"""Lists that clients read page by page."""

from typing import Any

from sqlalchemy import Row, Select, Table, and_, or_
from sqlalchemy.ext.asyncio import AsyncConnection

from localmoe.core.errors import InvalidRequestError


async def read_page(
    connection: AsyncConnection,
    visible: Select[Any],
    table: Table,
    *,
    after: str | None,
    newest_first: bool = True,
    limit: int,
) -> list[Row[Any]]:
    """Rows in order of their creation, beginning behind the one of id `after`.

    Args:
        visible: the rows of this table that whoever asks may see.

    Raises:
        InvalidRequestError: `after` is none of them. If it was deleted, nobody knows where to go on; that nothing
            follows would be taken for the end.
    """
    created, row_id = table.c.created_at, table.c.id
    if after is not None:
        there = (await connection.execute(visible.with_only_columns(created).where(row_id == after))).scalar()
        if there is None:
            raise InvalidRequestError(
                f"after is {after[:200]!r}, which is not in the list (any more)", param="after"
            )
        if newest_first:
            visible = visible.where(or_(created < there, and_(created == there, row_id < after)))
        else:
            visible = visible.where(or_(created > there, and_(created == there, row_id > after)))
    order = (created.desc(), row_id.desc()) if newest_first else (created, row_id)
    return list(await connection.execute(visible.order_by(*order).limit(limit)))
