"""A gateway over a scripted model, in a process of its own that can be killed: `python jobs_server.py HOME SETTINGS`,
where SETTINGS are JSON. Prints its port once it listens."""

import asyncio
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import uvicorn

from localmoe.backends.scripted import ScriptedBackend
from localmoe.cli.state import ServerState
from localmoe.core.current import Current
from localmoe.core.events import EventBus
from localmoe.gateway.app import create_app
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.state.config import StateConfig
from localmoe.text.text_model import TextModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.tiny_text import encode, make_services, served_model, write_tiny_text_model


async def serve(home: Path, settings: dict[str, dict[str, object]]) -> None:
    text = TextModel.load(write_tiny_text_model(home / "model"))
    backend = ScriptedBackend(encode(text, "hello world"), delay_s=0.002)
    await backend.start()
    config = GatewayConfig(jobs=JobsConfig(**settings.get("jobs", {})))  # type: ignore[arg-type]
    bus = EventBus()
    state = ServerState(StateConfig(**settings.get("state", {})), Current(config), home=home)  # type: ignore[arg-type]
    services = replace(make_services(bus), jobs=state.jobs)
    app = create_app({"tiny": served_model(text, backend)}, services=services, config=Current(config), bus=bus)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        state.start(app)
        print(listener.getsockname()[1], flush=True)
        await uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).serve([listener])
    await state.stop()
    await state.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), json.loads(sys.argv[2])))
