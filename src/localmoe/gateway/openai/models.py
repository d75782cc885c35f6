"""`GET /v1/models` and `/v1/models/{id}`."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.openapi import ERROR_RESPONSES


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "localmoe"
    max_model_len: int | None
    """Context in tokens; null where only the engine knows."""
    root: str
    """The name that answers show; another one where it has several."""
    parent: str | None
    """Of an adapter: the model that it adapts."""


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def router(context: GatewayContext) -> APIRouter:
    """The routes over these models."""
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models", summary="List the served models")
    async def list_models() -> ModelList:
        return ModelList(data=[model_card(name, model) for name, model in context.models.items()])

    # A path parameter: names of models may hold slashes.
    @routes.get("/v1/models/{model_id:path}", responses=ERROR_RESPONSES, summary="Describe a served model")
    async def get_model(model_id: str) -> ModelCard:
        return model_card(model_id, context.model(model_id))

    return routes


def model_card(name: str, model: ServedModel) -> ModelCard:
    """A model under one of its names."""
    return ModelCard(
        id=name, created=model.created, max_model_len=model.context_tokens, root=model.id, parent=model.parent
    )
