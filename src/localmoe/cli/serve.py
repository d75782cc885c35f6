"""`localmoe serve`: an engine and the gateway in front of it, wired together."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.catalog.catalog import DEMO_NAME, Catalog
from localmoe.config.profiles import Profile
from localmoe.config.settings import Settings, load_settings
from localmoe.core.errors import ConfigError, ModelBuildError, ModelNotFoundError
from localmoe.core.model import WeightFormat

if TYPE_CHECKING:
    from fastapi import FastAPI

    from localmoe.backends.base import Backend

_PORT_ERRORS = {errno.EADDRINUSE, errno.EACCES}
_DRAIN_S = 5
"""How long open answers may go on after a signal to stop."""


def serve(
    model: Annotated[str, typer.Argument(help="A model from `localmoe models list`.")] = DEMO_NAME,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; 0 lets the system choose.", show_default="8000")
    ] = None,
    weights: Annotated[
        WeightFormat, typer.Option(help="Format of the experts; made from the checkpoint when first asked for.")
    ] = WeightFormat.NVFP4,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Compute threads.", show_default="one per physical core")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="What computes: cpu, cuda, cuda:1 and so on.", show_default="auto")
    ] = None,
    profile: Annotated[
        Profile | None, typer.Option(help="Defaults for what is not set otherwise.", show_default="auto")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file of settings; see docs/settings.md.", show_default=False)
    ] = None,
    routing_trace: Annotated[
        Path | None,
        typer.Option(
            help="File to write down in which experts are chosen, for `localmoe bench cache`; packed if it ends in "
            ".gz.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a model over the OpenAI API.

    Without a model, the demo model is served, and made first if it is not there.

    Examples:

      localmoe serve

      localmoe serve mixtral --weights mxfp4 --port 9000 --threads 8

      localmoe serve mixtral --profile low_latency --config site.yaml
    """
    settings = load_settings(config=config, profile=profile, on_note=lambda note: _say(f"note: {note}"))
    flags = {"routing_trace": routing_trace, "device": device}
    settings = _with_flags(settings, {name: str(value) for name, value in flags.items() if value is not None})
    _check_writable(settings.engine.routing_trace)
    listener = _bind(host or settings.host, settings.port if port is None else port)
    with listener:
        catalog = Catalog(settings.home)
        _provide(catalog, model, weights)
        import uvloop

        uvloop.run(_serve(settings, catalog, model, weights, threads, listener))


def _with_flags(settings: Settings, flags: dict[str, str]) -> Settings:
    """Settings with the engine's that the command line says. Raises ConfigError."""
    engine = settings.engine
    for name, value in flags.items():
        try:
            engine = replace(engine, **{name: value})  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"--{name.replace('_', '-')}: {error}") from error
    return settings.model_copy(update={"engine": engine})


def _check_writable(trace: str | None) -> None:
    """Refuse a trace that cannot be written before anything slow happens. Raises ConfigError."""
    if trace is None:
        return
    path = Path(trace).absolute()
    parent = path.parent
    if path.is_dir():
        raise ConfigError(f"routing_trace is {trace!r}, which is a directory; name a file in it")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"routing_trace is {trace!r}, but {parent} is no directory that can be written to")


def _bind(host: str, port: int) -> socket.socket:
    """Bound before anything slow happens, so that a taken port is known at once; it listens once we can answer."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        flag = "--port" if getattr(error, "errno", None) in _PORT_ERRORS else "--host"
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; choose another {flag}") from error
    with contextlib.suppress(ValueError):
        if not ipaddress.ip_address(host).is_loopback:
            _say(f"warning: everyone who can reach {host} can use this server; it asks for no key")
    return listener


def _provide(catalog: Catalog, model: str, weights: WeightFormat) -> None:
    """Make what is missing, in a process of its own: it needs torch, which the gateway's process never loads."""
    try:
        stored = catalog.has_store(model, weights)
    except ModelNotFoundError:
        if model != DEMO_NAME:
            raise
        _models_command("build-demo")
        stored = catalog.has_store(model, weights)
    if not stored:
        _models_command("convert", model, "--weights", weights)


def _models_command(*arguments: str) -> None:
    status = subprocess.run([sys.executable, "-m", "localmoe", "models", *arguments], check=False).returncode
    if status != 0:
        raise ModelBuildError(f"`localmoe models {' '.join(arguments)}` failed with exit status {status}")


async def _run(backend: "Backend", app: "FastAPI", listener: socket.socket, what: str) -> None:
    """Serve until a signal says stop. The first one lets open answers finish, the second does not wait."""
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals to us: uvicorn would raise them again and end the process before the engine is stopped."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=_DRAIN_S
    )
    server = Server(config)
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, server.handle_exit, name, None)
    try:
        listener.listen(config.backlog)
    except OSError as error:
        raise ConfigError(f"cannot listen: {error.strerror}; another server was faster") from error
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(backend.start())
    try:
        _say(f"localmoe: listening on {url}")
        _say(f"localmoe: loading {what}")
        started = time.monotonic()
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await starting
            _say(f"localmoe: ready after {time.monotonic() - started:.1f} s; API docs at {url}/docs")
        await serving
    finally:
        server.should_exit = True
        starting.cancel()
        await asyncio.gather(serving, starting, return_exceptions=True)
        await backend.stop()


async def _serve(
    settings: Settings,
    catalog: Catalog,
    model: str,
    weights: WeightFormat,
    threads: int | None,
    listener: socket.socket,
) -> None:
    """Wire the parts together, and run them."""
    from localmoe.backends.native import NativeBackend
    from localmoe.core.events import EventBus
    from localmoe.gateway.app import create_app
    from localmoe.gateway.context import ServedModel
    from localmoe.hardware.memory import available_memory_bytes
    from localmoe.hardware.processors import num_processors
    from localmoe.observability.metrics import Metrics
    from localmoe.text.text_model import TextModel

    engine = replace(settings.engine, num_threads=threads or settings.engine.num_threads or num_processors())
    bus = EventBus()
    store_path = catalog.store_path(model, weights)
    backend = NativeBackend(
        model=model,
        store_path=store_path,
        config=engine,
        available_memory=available_memory_bytes,
        bus=bus,
    )
    context_tokens = catalog.context_tokens(model)
    served = ServedModel(
        id=model,
        created=int(store_path.stat().st_mtime),
        text=TextModel.load(catalog.path(model)),
        context_tokens=min(context_tokens, engine.max_context_tokens or context_tokens),
        generator=backend,
        inspectable=backend,
    )
    app = create_app([served], config=settings.gateway, bus=bus, render_metrics=Metrics(bus).render)
    await _run(backend, app, listener, f"{model} ({weights})")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
