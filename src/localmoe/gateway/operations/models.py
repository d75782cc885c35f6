"""`POST /v1/models/load`, `/unload` and `/switch`: changes to what is served, while it is."""

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from localmoe.core.errors import InvalidRequestError
from localmoe.core.model import WeightFormat
from localmoe.core.protocols import ModelOperations
from localmoe.core.serving import AnswerFormatName, EngineSpec, ModelSpec
from localmoe.gateway.context import GatewayContext
from localmoe.gateway.fields import ApiModel, ModelId, is_list
from localmoe.gateway.openai.models import ModelCard, model_card
from localmoe.gateway.openapi import ERROR_RESPONSES

MAX_ENGINES = 64
MAX_NAMES = 64
MAX_DEVICES = 1024

EngineKind = Annotated[str, Field(max_length=64, pattern=r"^[a-z][a-z0-9_-]*$")]
Device = Annotated[int, Field(ge=0, lt=MAX_DEVICES)]
ServedName = Annotated[ModelId, Field(min_length=1)]
ServedNames = Annotated[
    Annotated[ServedName, Tag("<text>")]
    | Annotated[list[ServedName], Field(min_length=1, max_length=MAX_NAMES, fail_fast=True), Tag("<list>")],
    Discriminator(is_list),
]


class LoadRequest(ApiModel):
    """A model, and the engines that are to serve it."""

    EXAMPLE = {"model": "smollm2-8x135m", "engines": ["native"]}  # noqa: RUF012

    model: ModelId | None = Field(default=None, min_length=1, description="A name of `localmoe models list`.")
    model_name: ModelId | None = Field(default=None, min_length=1, description="Another word for `model`.")
    served_model_name: ServedNames | None = Field(
        default=None, description="The name to serve it under, or several; answers show the first."
    )
    name: ModelId | None = Field(
        default=None, min_length=1, description="Another word for one `served_model_name`."
    )
    weights: WeightFormat = Field(
        default=WeightFormat.NVFP4, strict=False, description="Format of the experts, for native engines."
    )
    answer_format: AnswerFormatName | None = Field(
        default=None, description="How it writes tool calls; as its chat template shows if omitted."
    )
    engines: Annotated[list[EngineKind], Field(min_length=1, max_length=MAX_ENGINES, fail_fast=True)] = Field(
        default=["native"], description="Kinds of engines, set up as the server's settings say; one may repeat."
    )
    tensor_parallel_size: int | None = Field(
        default=None, ge=1, le=MAX_DEVICES, description="GPUs that share each layer; for vLLM."
    )
    gpu_devices: Annotated[list[Device], Field(max_length=MAX_DEVICES, fail_fast=True)] | None = Field(
        default=None, description="GPUs to use; for vLLM."
    )

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if (self.model is None) == (self.model_name is None):
            raise InvalidRequestError("name the model to load, once", param="model")
        if self.served_model_name is not None and self.name is not None:
            raise InvalidRequestError("say served_model_name or name, which mean the same", param="name")
        return self

    def spec(self) -> ModelSpec:
        """In our own words. Raises InvalidRequestError."""
        names = self.served_model_name or self.name or ()
        settings: dict[str, Any] = {}
        if self.tensor_parallel_size is not None:
            settings["tensor_parallel_size"] = self.tensor_parallel_size
        if self.gpu_devices is not None:
            settings["gpu_devices"] = self.gpu_devices
        try:
            return ModelSpec(
                model=self.model or self.model_name or "",
                served_model_name=tuple(names) if isinstance(names, list) else names,
                weights=self.weights,
                answer_format=self.answer_format,
                engines=tuple(EngineSpec(engine=kind, settings=settings) for kind in self.engines),
            )
        except ValueError as error:
            raise InvalidRequestError(str(error), param="served_model_name") from error


class SwitchRequest(LoadRequest):
    """A model that takes another's place."""

    EXAMPLE = {"model": "mixtral", "replace": "smollm2-8x135m"}  # noqa: RUF012

    replace: ModelId | None = Field(
        default=None,
        description="The model to replace, by any of its names; may be omitted where there is one only.",
    )


class UnloadRequest(ApiModel):
    """A model to be served no more."""

    EXAMPLE = {"model": "smollm2-8x135m"}  # noqa: RUF012

    model: ModelId = Field(description="Any of its names.")


class Unloaded(BaseModel):
    """It is gone, and its memory is free."""

    id: str
    object: Literal["model"] = "model"
    unloaded: Literal[True] = True


def router(context: GatewayContext, operations: ModelOperations) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["models"])

    @routes.post("/v1/models/load", responses=ERROR_RESPONSES, summary="Serve one model more")
    async def load(body: LoadRequest) -> ModelCard:
        """Answers when the model is ready, or has failed to load; what was served before still is."""
        spec = body.spec()
        await _to_the_end(operations.load(spec))
        return model_card(spec.served_name, context.model(spec.served_name))

    @routes.post("/v1/models/switch", responses=ERROR_RESPONSES, summary="Serve one model in another's place")
    async def switch(body: SwitchRequest) -> ModelCard:
        """The new model gets the old one's names, and its own. It is loaded beside the old one where memory holds
        both, and takes over when it is ready; answers under way are finished by the old one. If it cannot be loaded,
        the old one serves on."""
        spec = body.spec()
        await _to_the_end(operations.switch(body.replace, spec))
        return model_card(spec.served_name, context.model(spec.served_name))

    @routes.post("/v1/models/unload", responses=ERROR_RESPONSES, summary="Serve a model no more")
    async def unload(body: UnloadRequest) -> Unloaded:
        """Its answers under way are finished first."""
        await _to_the_end(operations.unload(body.model))
        return Unloaded(id=body.model)

    return routes


async def _to_the_end(change: Coroutine[Any, Any, None]) -> None:
    """A change that has begun is finished, whether or not its client waits for it."""
    await asyncio.shield(asyncio.create_task(change))
