"""What the routes' documentation shares."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from localmoe.gateway.chat_schema import ChatCompletionChunk
from localmoe.gateway.errors import ErrorResponse

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served as it stands."},
    "5XX": {"model": ErrorResponse, "description": "The engine is not available (503) or failed (500)."},
}


_REF = "#/components/schemas/{model}"


def stream_or(chunk: str) -> dict[str, Any]:
    """Documents that the same route also streams events, each a `chunk`."""
    return {
        "description": f"The answer; with `stream: true` server-sent events, each a `{chunk}`, then `[DONE]`.",
        "content": {"text/event-stream": {"schema": {"$ref": _REF.format(model=chunk)}}},
    }


class DocumentedApp(FastAPI):
    """Adds to the documentation the schema that no route returns as a whole body: a stream's chunk."""

    def openapi(self) -> dict[str, Any]:
        """See `FastAPI.openapi`."""
        document = super().openapi()
        _, chunk = models_json_schema([(ChatCompletionChunk, "serialization")], ref_template=_REF)
        for name, schema in chunk["$defs"].items():
            document["components"]["schemas"].setdefault(name, schema)
        return document
