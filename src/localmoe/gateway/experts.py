"""`GET /v1/experts`: where experts are, which are used, and what that costs. `localmoe inspect` shows it."""

import asyncio

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from localmoe.core.inspection import InspectionList
from localmoe.gateway.context import GatewayContext
from localmoe.gateway.openapi import ERROR_RESPONSES, ref_to


def router(context: GatewayContext) -> APIRouter:
    """The route over these models."""
    routes = APIRouter(tags=["operations"])

    # Encoded by msgspec, which is why its documentation is by hand.
    @routes.get(
        "/v1/experts",
        response_class=Response,
        responses={200: {"content": {"application/json": {"schema": ref_to(InspectionList)}}}, **ERROR_RESPONSES},
        summary="Where experts are, which are used, and what memory and links do",
    )
    async def inspect() -> Response:
        """`heat[layer][expert]` counts the tokens that chose an expert, `placement[layer][expert]` is the fastest
        tier that it is in: `device`, `ram` or `disk`. `layer_times` are means per layer, of steps that only decode
        and of those that compute prompts. `tiers` is null, and `links` empty, where all experts are in memory. Sizes
        are in bytes, times in seconds, totals since the engine started."""
        inspectables = [model.inspectable for model in context.models.values() if model.inspectable is not None]
        found = await asyncio.gather(*(inspectable.inspect() for inspectable in inspectables))
        return Response(msgspec.json.encode(InspectionList(data=found)), media_type="application/json")

    return routes
