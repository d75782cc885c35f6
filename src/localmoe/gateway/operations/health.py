"""`GET /health/live`, `/health/ready` and `/metrics`."""

from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from localmoe.core.errors import BackendUnavailableError
from localmoe.gateway.context import GatewayContext
from localmoe.gateway.openapi import ERROR_RESPONSES


class Health(BaseModel):
    """A healthy server's answer; another one answers with an error."""

    status: Literal["live", "ready"]


def router(context: GatewayContext, render_metrics: Callable[[], tuple[bytes, str]]) -> APIRouter:
    """The routes.

    Args:
        render_metrics: returns a document and its content type.
    """
    routes = APIRouter(tags=["operations"])

    @routes.get("/health/live", summary="Whether the server answers at all")
    async def live() -> Health:
        return Health(status="live")

    @routes.get("/health/ready", responses=ERROR_RESPONSES, summary="Whether every model admits requests")
    async def ready() -> Health:
        waiting = [name for name, model in context.models.items() if not model.generator.is_ready]
        if waiting:
            raise BackendUnavailableError(f"not ready: {', '.join(waiting)}")
        return Health(status="ready")

    @routes.get("/metrics", response_class=Response, summary="Prometheus metrics")
    async def metrics() -> Response:
        document, content_type = render_metrics()
        return Response(document, headers={"content-type": content_type})

    return routes
