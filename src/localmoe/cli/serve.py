"""`localmoe serve`: what is to be served, from the command line and the settings; `serving` does it."""

import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from localmoe.catalog.catalog import DEMO_NAME, Catalog
from localmoe.cli.identity import refuse_if_nobody_could_enter, say_who_is_asked, with_identity_decided
from localmoe.cli.machine import find_findings
from localmoe.cli.providing import provide
from localmoe.cli.spec_checks import check_specs
from localmoe.cli.terminal import say
from localmoe.config.profiles import Profile
from localmoe.config.settings import ConfigSource, Settings, read_settings
from localmoe.core.errors import ConfigError
from localmoe.core.imports import lasting_imports
from localmoe.core.model import WeightFormat
from localmoe.core.serving import EngineSpec, ModelSpec

_PORT_ERRORS = {errno.EADDRINUSE, errno.EACCES}

_Model = Annotated[
    str | None,
    typer.Argument(help="From `localmoe models list`, or a name in the settings.", show_default=DEMO_NAME),
]
_Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")]
_Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port; 0 lets the system choose.", show_default="8000")
]
_Engine = Annotated[
    list[str] | None,
    typer.Option(
        help="What computes: native, vllm or deepspeed; may be repeated, also the same.", show_default="native"
    ),
]
_Weights = Annotated[
    WeightFormat | None,
    typer.Option(
        help="Format of the experts, for native engines; made from the checkpoint when first asked for.",
        show_default="nvfp4",
    ),
]
_Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Compute threads.", show_default="one per physical core")
]
_Device = Annotated[
    str | None, typer.Option(help="What computes: cpu, cuda, cuda:1 and so on.", show_default="auto")
]
_Profile = Annotated[
    Profile | None, typer.Option(help="Defaults for what is not set otherwise.", show_default="auto")
]
_Config = Annotated[
    Path | None, typer.Option(help="YAML or JSON file of settings; see docs/settings.md.", show_default=False)
]
_Env = Annotated[
    str | None,
    typer.Option(
        help="Where this runs, such as production: FILE.ENV.yaml is laid over FILE.yaml.", show_default=False
    ),
]
_Ray = Annotated[
    bool, typer.Option("--ray", help="Serve on a Ray cluster that is running already; see docs/ray.md.")
]
_RoutingTrace = Annotated[
    Path | None,
    typer.Option(
        help="File to write down in which experts are chosen, for `localmoe bench cache`; packed if it ends in "
        ".gz.",
        show_default=False,
    ),
]


_ChatTemplate = Annotated[
    Path | None,
    typer.Option(help="File with a Jinja chat template, in place of the model's own.", show_default=False),
]


def serve(
    model: _Model = None,
    host: _Host = None,
    port: _Port = None,
    engine: _Engine = None,
    weights: _Weights = None,
    threads: _Threads = None,
    device: _Device = None,
    profile: _Profile = None,
    config: _Config = None,
    env: _Env = None,
    ray: _Ray = False,
    routing_trace: _RoutingTrace = None,
    chat_template: _ChatTemplate = None,
) -> None:
    """Serve models over HTTP, as OpenAI's and Anthropic's APIs do.

    Without a model, those that the settings name are served, or else the demo model, which is made first if it is not
    there. With several engines, each request goes to the one that will complete it first, and answers survive an
    engine's death.

    Examples:

      localmoe serve

      localmoe serve mixtral --weights mxfp4 --port 9000 --threads 8

      localmoe serve mixtral --profile low_latency --config site.yaml

      localmoe serve mixtral --engine native --engine vllm

      localmoe serve mixtral --chat-template brief.jinja
    """
    flags = {
        ("host",): host,
        ("port",): port,
        ("engine", "device"): device,
        ("engine", "routing_trace"): None if routing_trace is None else str(routing_trace),
    }
    loaded = read_settings(ConfigSource(config=config, env=env, profile=profile, flags=flags))
    for note in loaded.notes:
        say(f"note: {note}")
    settings = loaded.settings
    _check_writable(settings.engine.routing_trace)

    def specs_of(settings: Settings) -> list[ModelSpec]:
        return _specs(settings, model, engine, weights, chat_template)

    specs = specs_of(settings)
    check_specs(specs)
    if ray:
        _serve_on_ray(settings, specs, threads)
        return
    listener = _bind(settings.host, settings.port)
    with listener:
        refuse_if_nobody_could_enter(settings)
        catalog = Catalog(settings.home)
        for spec in specs:
            provide(catalog, spec)
        for finding in find_findings(settings.model_copy(update={"models": tuple(specs)})):
            say(str(finding))
        with lasting_imports():
            import uvloop

            from localmoe.cli.serving import serve_here

        uvloop.run(serve_here(loaded, catalog, specs_of, threads, listener))


def _serve_on_ray(settings: Settings, specs: Sequence[ModelSpec], threads: int | None) -> None:
    from localmoe.cli.ray_serving import serve_on_ray

    settings = with_identity_decided(settings)
    say_who_is_asked(settings.host, asks=settings.gateway.identity.mode == "required")
    if threads is not None:
        settings = settings.model_copy(update={"engine": replace(settings.engine, num_threads=threads)})
    serve_on_ray(settings, specs, host=settings.host, port=settings.port)


def _specs(
    settings: Settings,
    model: str | None,
    engines: list[str] | None,
    weights: WeightFormat | None,
    chat_template: Path | None,
) -> list[ModelSpec]:
    """What to serve: what the command line says, else what the settings say, else the demo model."""
    specs = {name: spec for spec in settings.models for name in spec.names}
    if model is None and specs:
        if any(flag is not None for flag in (engines, weights, chat_template)):
            raise ConfigError(
                f"say which model --engine, --weights and --chat-template are for; the settings name "
                f"{', '.join(specs)}"
            )
        return list(settings.models)
    spec = specs.get(model or DEMO_NAME, ModelSpec(model=model or DEMO_NAME))
    if engines is not None:
        spec = replace(spec, engines=tuple(EngineSpec(engine=kind) for kind in engines))
    if chat_template is not None:
        spec = replace(spec, chat_template=str(chat_template))
    return [spec if weights is None else replace(spec, weights=weights)]


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
    """Bound before anything slow happens, so that a taken port is known at once; it listens once models are there."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        flag = "--port" if getattr(error, "errno", None) in _PORT_ERRORS else "--host"
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; choose another {flag}") from error
    return listener
