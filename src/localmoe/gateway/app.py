"""Puts the HTTP service together."""

from collections.abc import Callable, Iterable

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

import localmoe
from localmoe.core.errors import LocalMoEError
from localmoe.core.events import EventBus
from localmoe.gateway import chat, completions, experts, health, models, tokens
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.errors import handle_http_exception, handle_known_error, handle_validation_error
from localmoe.gateway.middleware import BodyLimitMiddleware, RequestIdMiddleware
from localmoe.gateway.openapi import DocumentedApp


def create_app(
    served: Iterable[ServedModel],
    *,
    config: GatewayConfig,
    bus: EventBus,
    render_metrics: Callable[[], tuple[bytes, str]],
) -> FastAPI:
    """The ASGI application. Starting and stopping the models' engines is the caller's business.

    Args:
        served: with distinct ids.
        bus: gets a `RequestFinished` for every answer.
        render_metrics: what `/metrics` shows, with its content type.
    """
    by_id: dict[str, ServedModel] = {}
    for model in served:
        if model.id in by_id:
            raise ValueError(f"two served models are named {model.id!r}")
        by_id[model.id] = model
    context = GatewayContext(models=by_id, config=config, bus=bus)
    app = DocumentedApp(
        title="LocalMoE",
        version=localmoe.__version__,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would carry the client's Host header
        middleware=[
            Middleware(RequestIdMiddleware),
            Middleware(BodyLimitMiddleware, max_body_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s),
        ],
        exception_handlers={
            LocalMoEError: handle_known_error,
            RequestValidationError: handle_validation_error,
            HTTPException: handle_http_exception,
        },
    )
    for router in (
        chat.router(context),
        completions.router(context),
        models.router(context),
        tokens.router(context),
        experts.router(context),
        health.router(context, render_metrics),
    ):
        app.include_router(router)
    return app
