"""What the routes' documentation shares."""

from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from localmoe.core.inspection import InspectionList
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


def ref_to(schema: type) -> dict[str, str]:
    """Names a schema that `DocumentedApp` adds."""
    return {"$ref": _REF.format(model=schema.__name__)}


class DocumentedApp(FastAPI):
    """Adds to the documentation the schemas that FastAPI does not find: a stream's chunk, and those of msgspec."""

    def openapi(self) -> dict[str, Any]:
        """See `FastAPI.openapi`."""
        document = super().openapi()
        _, chunk = models_json_schema([(ChatCompletionChunk, "serialization")], ref_template=_REF)
        _, inspection = msgspec.json.schema_components([InspectionList], ref_template=_REF.format(model="{name}"))
        for name, schema in (chunk["$defs"] | inspection).items():
            document["components"]["schemas"].setdefault(name, schema)
        return document
