"""A gateway that keeps files and runs jobs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
from fastapi import FastAPI

from localmoe.backends.scripted import ScriptedBackend
from localmoe.cli.state import ServerState
from localmoe.core.current import Current
from localmoe.core.events import EventBus
from localmoe.gateway.app import create_app
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.authenticator import Authenticator
from localmoe.gateway.middleware.stack import Guard
from localmoe.state.config import StateConfig
from localmoe.text.text_model import TextModel
from support.tiny_text import make_services, served_model


@dataclass(frozen=True)
class StatefulGateway:
    """One, while it serves."""

    app: FastAPI
    state: ServerState
    client: httpx2.AsyncClient
    config: Current[GatewayConfig]


@asynccontextmanager
async def stateful_gateway(
    text: TextModel,
    backend: ScriptedBackend,
    home: Path,
    *,
    config: GatewayConfig | None = None,
    state_config: StateConfig | None = None,
    asks_for_keys: bool = False,
    runs_jobs: bool = True,
    name: str = "tiny",
) -> AsyncIterator[StatefulGateway]:
    """A gateway over one scripted model of this name, whose state is in `home`."""
    await backend.start()
    current, bus = Current(config or GatewayConfig()), EventBus()
    state = ServerState(state_config or StateConfig(), current, home=home)
    guard = Guard(identity=Authenticator(state.keys, None)) if asks_for_keys else Guard()
    services = replace(make_services(bus), jobs=state.jobs)
    app = create_app({name: served_model(text, backend)}, services=services, config=current, bus=bus, guard=guard)
    if runs_jobs:
        state.start(app)
    transport = httpx2.ASGITransport(app=app)
    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield StatefulGateway(app, state, client, current)
    finally:
        await state.stop()
        await state.close()


async def upload(client: httpx2.AsyncClient, contents: bytes, **fields: str) -> httpx2.Response:
    """Keep a file, for a batch unless `purpose` is said."""
    form = {"purpose": "batch", **fields}
    return await client.post("/v1/files", files={"file": ("in.jsonl", contents)}, data=form)
