"""`/v1/config`: the settings, changes to them while the server serves, and what was in effect before."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Response
from pydantic import BaseModel, Field

from localmoe.core.configuration import ConfigOutcome, ConfigState, ConfigVersion, Setting
from localmoe.core.protocols import ConfigOperations
from localmoe.gateway.exchange import current_principal
from localmoe.gateway.fields import UNICODE, ApiModel
from localmoe.gateway.openapi import ERROR_RESPONSES

MAX_REASON_CHARS = 500
MAX_VERSIONS = 1000
"""In one answer."""

Key = Annotated[str, Path(max_length=200, description="Names with dots, as `dispatch.max_queued`, or a block's.")]
Reason = Annotated[
    str,
    Field(default="", max_length=MAX_REASON_CHARS, pattern=r"^[^\x00-\x1f\x7f]*$", description="For the history."),
    UNICODE,
]


class ReloadRequest(ApiModel):
    """Read the files again."""

    EXAMPLE = {"reason": "two more seats"}  # noqa: RUF012

    reason: Reason


class ChangeRequest(ApiModel):
    """A new value."""

    EXAMPLE = {"value": 500, "reason": "shorter queues"}  # noqa: RUF012

    value: Any = Field(description="Of the setting; of a block, those of its settings that are to change.")
    reason: Reason


class RollbackRequest(ApiModel):
    """A version to go back to."""

    EXAMPLE = {"version": 3, "reason": "as it was before"}  # noqa: RUF012

    version: int = Field(ge=1, lt=2**31)
    reason: Reason


class ConfigVersionList(BaseModel):
    """Versions, the latest first."""

    object: Literal["list"] = "list"
    data: Sequence[ConfigVersion]


def router(operations: ConfigOperations) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["configuration"])

    @routes.get("/v1/config", responses=ERROR_RESPONSES, summary="All settings")
    async def state() -> ConfigState:
        """Secrets are masked, or shown as the references that they are."""
        return operations.state()

    @routes.get("/v1/config/history", responses=ERROR_RESPONSES, summary="What was in effect before")
    async def history(limit: Annotated[int, Query(ge=1, le=MAX_VERSIONS)] = 100) -> ConfigVersionList:
        """The latest first, each with what it changed."""
        return ConfigVersionList(data=await operations.versions(limit))

    @routes.post("/v1/config/reload", responses=ERROR_RESPONSES, summary="Read the configuration files again")
    async def reload(body: ReloadRequest | None = None) -> ConfigOutcome:
        """What differs is applied; engines and models that it does not concern serve on. Where it cannot be, as it is
        wrong or a model cannot be loaded, all stays as it was."""
        reason = body.reason if body else ""
        return await operations.reload(author=_author(), reason=reason)

    @routes.post("/v1/config/rollback", responses=ERROR_RESPONSES, summary="Go back to an earlier version")
    async def rollback(body: RollbackRequest) -> ConfigOutcome:
        """The configuration files become what they were, byte for byte, and are applied."""
        return await operations.rollback(body.version, author=_author(), reason=body.reason)

    @routes.get("/v1/config/{key}", responses=ERROR_RESPONSES, summary="One setting, or a block of them")
    async def setting(key: Key, response: Response) -> Setting:
        """With where each is from, and when a change takes effect. The header `ETag` is its version."""
        found = operations.setting(key)
        response.headers["etag"] = found.etag
        return found

    @routes.patch("/v1/config/{key}", responses=ERROR_RESPONSES, summary="Change a setting, or some of a block")
    async def change(
        key: Key,
        body: ChangeRequest,
        response: Response,
        if_match: Annotated[
            str | None, Header(max_length=200, description="An `ETag`: 412 if the setting has another one by now.")
        ] = None,
    ) -> ConfigOutcome:
        """In the configuration file, whose comments stay, and in the server. Where it cannot be applied, both stay as
        they were. The header `ETag` is the setting's new version."""
        outcome, made = await operations.set(
            key, body.value, if_match=if_match, author=_author(), reason=body.reason
        )
        response.headers["etag"] = made.etag
        return outcome

    return routes


def _author() -> str:
    principal = current_principal()
    return principal.name if principal.name == principal.id else f"{principal.name} ({principal.id})"
