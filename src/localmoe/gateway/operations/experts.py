"""`GET /v1/experts`: where experts are, which are used, and what that costs. `localmoe inspect` shows it."""

import asyncio

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from localmoe.core.errors import BackendUnavailableError
from localmoe.core.inspection import Inspection, InspectionList
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
        return Response(
            msgspec.json.encode(InspectionList(data=await inspect_all(context))), media_type="application/json"
        )

    return routes


async def inspect_all(context: GatewayContext) -> list[Inspection]:
    """What the engines say that can be looked into and are there.

    Raises:
        BackendUnavailableError: none of them is.
    """
    models = {id(model): model for model in context.models.values()}  # one may have several names
    inspectables = [one for model in models.values() for one in model.inspectables]
    asked = await asyncio.gather(*(one.inspect() for one in inspectables), return_exceptions=True)
    failures = [answer for answer in asked if isinstance(answer, BaseException)]
    found = [answer for answer in asked if not isinstance(answer, BaseException)]
    # One engine of several that is not there now does not hide the others.
    if failures and (not found or not all(isinstance(error, BackendUnavailableError) for error in failures)):
        raise failures[0]
    return found
