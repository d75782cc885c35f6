"""Lists that clients read page by page."""

from typing import Any

from sqlalchemy import Select, Table, and_, or_, select


def in_pages(statement: Select[Any], table: Table, *, after: str | None, newest_first: bool) -> Select[Any]:
    """The rows in order of their creation, beginning behind the one of id `after`: none where there is no such."""
    created, row_id = table.c.created_at, table.c.id
    if after is not None:
        there = select(created).where(row_id == after).scalar_subquery()
        if newest_first:
            statement = statement.where(or_(created < there, and_(created == there, row_id < after)))
        else:
            statement = statement.where(or_(created > there, and_(created == there, row_id > after)))
    order = (created.desc(), row_id.desc()) if newest_first else (created, row_id)
    return statement.order_by(*order)
