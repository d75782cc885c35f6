"""`localmoe doctor`: what this machine can do, and what it falls short of."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from localmoe.cli.terminal import say
from localmoe.config.settings import Settings, load_settings
from localmoe.core.model import WeightFormat

if TYPE_CHECKING:
    from localmoe.bench.doctor import Check, DoctorReport, ModelNeed


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hold the machine against this model, too: one of `localmoe models list`, olmoe-1b-7b, "
            "qwen3-30b-a3b, or the path of a config.json or GGUF file."
        ),
    ] = None,
    weights: Annotated[
        Literal["mxfp4", "nvfp4", "int8", "bf16"], typer.Option("--format", help="Format of the model's experts.")
    ] = "nvfp4",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Compute threads.", show_default="one per physical core")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure this machine, and say what is below a model's need or below the machines LocalMoE is meant for.

    Those are a workstation with one GPU, 96 GB of memory and a PCI Express 5.0 disk, and a server with two to four
    48 GB GPUs. Smaller machines work, too. Takes up to about 20 seconds; needs no GPU and no root.

    Examples:

      localmoe doctor

      localmoe doctor --model qwen3-30b-a3b --format mxfp4
    """
    from localmoe.bench.doctor import examine
    from localmoe.cli.expectations import with_threads

    settings = load_settings()
    num_threads = with_threads(settings.engine, threads).num_threads
    assert num_threads is not None
    need = None if model is None else _need(model, WeightFormat(weights), settings, threads)
    report = examine(settings.home, settings.engine.tiers.disk, num_threads, need, say)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode(report).decode())
    else:
        _print(report)


def _need(spec: str, weights: WeightFormat, settings: Settings, threads: int | None) -> "ModelNeed":
    from localmoe.bench.doctor import ModelNeed
    from localmoe.catalog.catalog import Catalog
    from localmoe.cli.expectations import find_model, predict_model, with_threads
    from localmoe.core.errors import EngineStartError
    from localmoe.engine.estimate import PlannedStore

    model = find_model(spec, settings)
    estimate, refusal = None, None
    try:
        estimate = predict_model(model, weights, settings, with_threads(settings.engine, threads), 1, say)
    except EngineStartError as error:
        refusal = str(error)
    catalog = Catalog(settings.home)
    return ModelNeed(
        name=model.name,
        estimate=estimate,
        refusal=refusal,
        has_store=catalog.has(spec) and catalog.has_store(spec, weights),
        store_bytes=PlannedStore.of(model.shape, weights).total_bytes,
    )


def _print(report: "DoctorReport") -> None:
    console = Console()
    console.print(report.machine, highlight=False)
    table = Table("what", "measured", "wanted", "by", "verdict")
    for check in report.checks:
        what, measured = check.what, _value(check, check.measured)
        for want in check.wants:
            bound = "at most" if check.is_limit else "at least"
            table.add_row(what, measured, f"{bound} {_value(check, want.value)}", want.by, want.verdict)
            what = measured = ""
        if not check.wants:
            table.add_row(what, measured)
    console.print(table)
    for check in report.checks:
        if check.note:
            console.print(f"{check.what}: {check.note}", highlight=False)
    estimate = report.estimate
    if estimate:
        console.print(
            f"{estimate.model}, {estimate.format}: {estimate.num_slots} of {estimate.num_experts} experts fit in "
            f"memory; decode {estimate.decode_tok_s:.1f} tok/s, prefill {estimate.prefill_tok_s:.0f} tok/s expected",
            highlight=False,
        )
    if report.refusal:
        console.print(f"The model would not start here: {report.refusal}", highlight=False)
    advised = [check for check in report.checks if check.advice]
    if advised:
        console.print("What is below, and what to do:", highlight=False)
    for check in advised:
        console.print(f"  {check.what}: {check.advice}", highlight=False)


def _value(check: "Check", value: float | None) -> str:
    if value is None:
        return "unknown"
    if check.unit == "installed":
        return "yes" if value else "no"
    return f"{value:,.0f} {check.unit}" if value >= 100 else f"{value:.3g} {check.unit}"
