"""Puts the HTTP service together."""

from collections.abc import Mapping

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import localmoe
from localmoe.core.current import Current
from localmoe.core.errors import LocalMoEError
from localmoe.core.events import EventBus
from localmoe.gateway import inference, infill, tokens
from localmoe.gateway.anthropic import routes as anthropic
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.context import GatewayContext, ServedModel, Services
from localmoe.gateway.documented_app import DocumentedApp
from localmoe.gateway.errors import handle_http_exception, handle_known_error, handle_validation_error
from localmoe.gateway.exchange import note_event
from localmoe.gateway.identity.visible_models import VisibleModels
from localmoe.gateway.jobs import batch_routes, file_routes
from localmoe.gateway.jobs import routes as job_routes
from localmoe.gateway.middleware.stack import Guard, middleware_stack
from localmoe.gateway.openai import chat, completions, embeddings
from localmoe.gateway.openai import models as model_list
from localmoe.gateway.operations import config as config_operations
from localmoe.gateway.operations import experts, health, stats
from localmoe.gateway.operations import models as model_operations
from localmoe.gateway.responses import routes as responses


def create_app(
    models: Mapping[str, ServedModel],
    *,
    services: Services,
    config: Current[GatewayConfig],
    bus: EventBus,
    guard: Guard = Guard(),  # noqa: B008  (frozen)
) -> FastAPI:
    """The ASGI application. Starting and stopping the models' engines is the caller's business.

    Args:
        models: by the names that clients use; may change while it serves.
        config: likewise.
        bus: gets a `RequestFinished` for every answer.
        guard: decides who is let in; unless told otherwise, everybody.
    """
    context = GatewayContext(models=VisibleModels(models), current=config, bus=bus)
    bus.subscribe(note_event)
    app = DocumentedApp(
        title="LocalMoE",
        version=localmoe.__version__,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would carry the client's Host header
        middleware=middleware_stack(config, guard, bus=bus, streamed_paths=(file_routes.UPLOAD_PATH,)),
        exception_handlers={
            LocalMoEError: handle_known_error,
            RequestValidationError: handle_validation_error,
            HTTPException: handle_http_exception,
        },
    )
    for router in (
        chat.router(context),
        completions.router(context),
        embeddings.router(context),
        responses.router(context, services.responses),
        anthropic.router(context),
        infill.router(context),
        model_list.router(context),
        model_operations.router(context, services.operations),
        tokens.router(context),
        experts.router(context),
        stats.router(context, services.performance, services.memory),
        inference.router(context, services.jobs),
        health.router(context, services.render_metrics),
    ):
        app.include_router(router)
    if services.jobs is not None:
        app.include_router(file_routes.router(services.jobs.folder, config.now.jobs))
        app.include_router(batch_routes.router(services.jobs, config.now.jobs))
        app.include_router(job_routes.router(services.jobs))
    if services.configuration is not None:
        app.include_router(config_operations.router(services.configuration))
    return app
