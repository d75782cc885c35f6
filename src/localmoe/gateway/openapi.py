"""What the routes' documentation shares."""

from collections.abc import Sequence
from typing import Any

from localmoe.gateway.errors import ErrorResponse

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served as it stands."},
    "5XX": {"model": ErrorResponse, "description": "The engine is not available (503) or failed (500)."},
}
SCHEMA_REF = "#/components/schemas/{model}"


def ref_to(schema: type) -> dict[str, str]:
    """Names a schema: a route's model, or one that `DocumentedApp` adds."""
    return {"$ref": SCHEMA_REF.format(model=schema.__name__)}


def documented(schema: type, *, streams: Sequence[type] = ()) -> dict[str, Any]:
    """Documents an answer that FastAPI cannot tell from the route, or not all of it.

    Args:
        schema: of the answer in one piece, as those that follow.
        streams: of the events that the same route streams.
    """
    content: dict[str, Any] = {"application/json": {"schema": ref_to(schema)}}
    if not streams:
        return {"description": "The answer.", "content": content}
    events = [ref_to(event) for event in streams]
    content["text/event-stream"] = {"schema": events[0] if len(events) == 1 else {"anyOf": events}}
    return {"description": "The answer; with `stream: true` server-sent events.", "content": content}
