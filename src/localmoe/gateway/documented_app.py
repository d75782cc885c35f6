"""The app whose documentation is complete."""

from typing import Any, get_args

import msgspec
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from localmoe.core.inspection import InspectionList
from localmoe.gateway.anthropic.wire import Message, MessageStreamEvent, TokenCount
from localmoe.gateway.inference import InferenceChunk
from localmoe.gateway.openai.chat_schema import ChatCompletionChunk
from localmoe.gateway.openapi import SCHEMA_REF
from localmoe.gateway.responses.wire import ItemList, ResponseDeleted, ResponseObject, ResponseStreamEvent

_CHUNKS = (ChatCompletionChunk, InferenceChunk)
_STRUCTS = (
    InspectionList,
    Message,
    TokenCount,
    *get_args(MessageStreamEvent),
    ResponseObject,
    ResponseDeleted,
    ItemList,
    *get_args(ResponseStreamEvent),
)
"""What routes answer with that msgspec encodes; with it comes what is inside."""


class DocumentedApp(FastAPI):
    """Adds to the documentation the schemas that FastAPI does not find: of streams, and of what msgspec encodes."""

    def openapi(self) -> dict[str, Any]:
        """See `FastAPI.openapi`."""
        if self.openapi_schema is None:
            schemas: dict[str, Any] = super().openapi()["components"]["schemas"]
            _, chunks = models_json_schema(
                [(chunk, "serialization") for chunk in _CHUNKS], ref_template=SCHEMA_REF
            )
            _, structs = msgspec.json.schema_components(_STRUCTS, ref_template=SCHEMA_REF.format(model="{name}"))
            for name, schema in (chunks["$defs"] | structs).items():
                schemas.setdefault(name, schema)
        assert self.openapi_schema is not None
        return self.openapi_schema
