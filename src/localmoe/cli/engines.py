"""`localmoe engines`: other engines that can answer beside our own."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from localmoe import __version__
from localmoe.backends.environments import ENGINES, EngineEnvironments, EngineStatus
from localmoe.catalog.catalog import Catalog
from localmoe.cli.progress import progress_bars
from localmoe.config.settings import load_settings
from localmoe.hardware.gpus import find_gpus

app = typer.Typer(no_args_is_help=True, help="Install other engines, and see which can serve what.")

_SERVES = {
    "native": "checkpoints (safetensors, GGUF) as stores in nvfp4, mxfp4, int8, bf16 or f32, larger than memory too",
    "vllm": "safetensors checkpoints in f32, bf16 or f16, and quantised with AWQ, GPTQ or FP8",
    "deepspeed": "safetensors checkpoints in f32 or bf16, with weights offloaded to RAM or NVMe (ZeRO-3)",
}


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    """An engine, and what it can serve on this machine."""

    status: EngineStatus
    serves: str
    models: list[str]


@app.command("list", epilog="Example: localmoe engines list --json")
def list_engines(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show each engine's version, whether it works, and which models here it can serve.

    Imports each engine in its own environment, which takes some seconds.
    """
    settings = load_settings()
    entries = Catalog(settings.home).list()
    environments = EngineEnvironments(settings.home)
    with ThreadPoolExecutor() as pool:
        found = [_native(), *pool.map(environments.status, ENGINES)]
    rows = [
        _Row(
            status=status,
            serves=_SERVES[status.engine],
            # Others read checkpoints; ours made a store of each model when it took it in.
            models=[entry.name for entry in entries if status.engine == "native" or entry.has_checkpoint],
        )
        for status in found
    ]
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return
    table = Table("engine", "version", "build", "state", "serves", "models here")
    for row in rows:
        state = row.status.state + (f": {row.status.problem}" if row.status.problem else "")
        table.add_row(
            row.status.engine,
            row.status.version or "–",
            row.status.build or "–",
            state,
            row.serves,
            ", ".join(row.models) or "none",
        )
    console = Console()
    console.print(table)
    for row in rows:
        if row.status.state not in ("ready", "broken"):
            console.print(f"{row.status.engine}: localmoe engines install {row.status.engine}", highlight=False)


@app.command(epilog="Example: localmoe engines install vllm")
def install(
    engine: Annotated[Literal["vllm", "deepspeed"], typer.Argument(help="Which engine.")],
) -> None:
    """Install an engine in an environment of its own, go on with an interrupted installation, or bring it up to date.

    Takes what pip is configured to use: its index, certificates and cache. The build is for CUDA where this machine
    has an NVIDIA GPU, else for the processor. Does nothing if it is there already.
    """
    environments = EngineEnvironments(load_settings().home)
    build: Literal["cpu", "cuda"] = "cuda" if find_gpus() else "cpu"
    with progress_bars() as on_progress:
        made = environments.install(engine, build, on_progress)
    typer.echo(
        f"{environments.path(engine)}: {engine} {made.version} for {made.build}, torch {made.torch_version}"
    )
    if engine == "deepspeed" and not Path("/usr/include/libaio.h").exists():
        typer.echo("To offload weights to NVMe it needs libaio: apt-get install libaio-dev")


def _native() -> EngineStatus:
    """Ours, which needs no environment: it is part of LocalMoE."""
    import torch

    return EngineStatus(
        engine="native",
        state="ready",
        version=__version__,
        build="cuda" if torch.cuda.is_available() else "cpu",
        torch_version=str(torch.__version__),  # a string of a kind of its own
    )
