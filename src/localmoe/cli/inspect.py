"""`localmoe inspect`: what a running server's experts and memory are doing."""

from collections.abc import Callable
from typing import Annotated, Any

import httpx2
import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from localmoe.cli.chat import open_client, refusal
from localmoe.config.settings import load_settings
from localmoe.core.errors import BackendUnavailableError, EngineFaultError
from localmoe.core.inspection import Inspection, InspectionList, LayerTimes

app = typer.Typer(no_args_is_help=True, help="Look into a running server: its experts, memory, links and layers.")

Url = Annotated[str | None, typer.Option(help="The server; by default the local one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a line of JSON for each model instead of tables.")]

_BLOCKS = "·▁▂▃▄▅▆▇█"
"""The first: not used at all."""
_OTHER_COLUMNS = 38
"""Width of what stands beside a heat strip."""
_NEAR, _FAR = "bold green", "dim"


@app.command(epilog="Examples: localmoe inspect experts · localmoe inspect experts --url http://gpu1:8000 --json")
def experts(url: Url = None, as_json: AsJson = False) -> None:
    """Show where experts are and how much each is used.

    A layer's strip has a block for each expert, the higher the more tokens chose it, green where it is in memory. In
    narrow terminals a block stands for several.
    """
    _show(
        url, as_json, ("num_layers", "num_experts", "expert_bytes", "tiers", "heat", "placement"), _print_experts
    )


@app.command(epilog="Examples: localmoe inspect memory · localmoe inspect memory --json")
def memory(url: Url = None, as_json: AsJson = False) -> None:
    """Show what memory was planned for, and what of it is used."""
    _show(url, as_json, ("memory",), _print_memory)


@app.command(epilog="Examples: localmoe inspect bandwidth · localmoe inspect bandwidth --json")
def bandwidth(url: Url = None, as_json: AsJson = False) -> None:
    """Show what passed over the links between tiers since the engine started, and how fast."""
    _show(url, as_json, ("links",), _print_bandwidth)


@app.command(epilog="Examples: localmoe inspect latency · localmoe inspect latency --json")
def latency(url: Url = None, as_json: AsJson = False) -> None:
    """Show how long each layer computes, and how long it waits for experts: means since the engine started."""
    _show(url, as_json, ("layer_times",), _print_latency)


def _show(
    url: str | None, as_json: bool, fields: tuple[str, ...], show: Callable[[Console, Inspection], None]
) -> None:
    settings = load_settings()
    console = Console()
    for inspection in _ask(url or f"http://{settings.host}:{settings.port}", settings.api_key):
        if as_json:
            line: dict[str, Any] = {field: getattr(inspection, field) for field in ("model", *fields)}
            typer.echo(msgspec.json.encode(line).decode())
        else:
            show(console, inspection)


def _ask(url: str, api_key: str | None) -> list[Inspection]:
    """What a server knows about its models.

    Args:
        api_key: to show it, if it asks.

    Raises:
        BackendUnavailableError: there is no server, or its engine is not ready.
        InvalidRequestError: the server does not know the question.
        EngineFaultError: it answers with something else.
    """
    with open_client(url, api_key=api_key) as http:
        try:
            response = http.get("/v1/experts")
        except httpx2.TransportError as error:
            raise BackendUnavailableError(
                f"no answer from {url}: {error}; start a server with `localmoe serve`, or name one with --url"
            ) from error
    if not response.is_success:
        raise refusal(response)
    try:
        return msgspec.json.decode(response.content, type=InspectionList).data
    except msgspec.MsgspecError as error:
        raise EngineFaultError(f"{response.url} answers with something else than a list of models") from error


def _print_experts(console: Console, inspection: Inspection) -> None:
    tiers = inspection.tiers
    total = inspection.num_layers * inspection.num_experts
    lines = [f"{inspection.model}: all {total} experts are in memory, {_size(inspection.expert_bytes)} each"]
    if tiers is not None:
        uses = max(1, tiers.hits + tiers.misses + tiers.device_hits)
        lines = [
            f"{inspection.model}: {tiers.num_present} of {total} experts are in memory, {tiers.num_slots} fit, "
            f"{_size(inspection.expert_bytes)} each",
            f"uses in a layer and step: {tiers.hits} found in memory ({tiers.hits / uses:.1%}), {tiers.misses} read "
            f"from the disk; {tiers.evictions} evictions",
            f"read ahead: {tiers.prefetches}; {tiers.prefetches_useful} useful, {tiers.prefetches_late} late, "
            f"{tiers.prefetches_wasted} wasted",
        ]
        if tiers.device_slots:
            lines += [
                f"on the device: {tiers.num_on_device} experts, {tiers.device_slots} fit; {tiers.device_hits} uses "
                f"found one there ({tiers.device_hits / uses:.1%}), {tiers.device_fetches} fetched one from memory",
                f"copies: {tiers.copies_in} to the device, {tiers.copies_out} back; {tiers.device_evictions} "
                f"evictions there",
            ]
    for line in lines:
        console.print(line, highlight=False, markup=False)
    table = Table("layer", "in memory", "tokens", "top tenth", "heat")
    num_blocks = max(8, console.width - _OTHER_COLUMNS)
    for layer, (heat, places) in enumerate(zip(inspection.heat, inspection.placement, strict=True)):
        num_present = sum(place != "disk" for place in places)
        hottest = sorted(heat, reverse=True)[: max(1, len(heat) // 10)]
        table.add_row(
            str(layer),
            str(num_present),
            str(sum(heat)),
            f"{sum(hottest) / max(1, sum(heat)):.0%}",
            heat_strip(heat, places, num_blocks),
        )
    console.print(table)


def heat_strip(heat: list[int], places: list[str], num_blocks: int) -> Text:
    """A block for each expert, or for so many neighbours that all fit; as high as the mean of their tokens."""
    size = -(-len(heat) // num_blocks)
    groups = [slice(start, start + size) for start in range(0, len(heat), size)]
    levels = [sum(heat[group]) / len(heat[group]) for group in groups]
    highest = max(levels) or 1
    strip = Text(no_wrap=True)
    for group, level in zip(groups, levels, strict=True):
        block = _BLOCKS[-(-int(level * 1000) * (len(_BLOCKS) - 1) // int(highest * 1000))]
        near = sum(place != "disk" for place in places[group])
        strip.append(block, _NEAR if 2 * near >= len(places[group]) else _FAR)
    return strip


def _print_memory(console: Console, inspection: Inspection) -> None:
    memory = inspection.memory
    console.print(
        f"{inspection.model}: {_size(memory.budget_bytes)} may be used; the process holds "
        f"{_size(memory.process_bytes)}, mapped files included",
        highlight=False,
        markup=False,
    )
    table = Table("memory", "planned", "used", "")
    for share in memory.shares:
        used = share.used_bytes
        table.add_row(
            share.name.replace("_", " "),
            _size(share.planned_bytes),
            "" if used is None else _size(used),
            "" if used is None else f"{used / max(1, share.planned_bytes):.0%}",
        )
    table.add_row("total", _size(sum(share.planned_bytes for share in memory.shares)), "", "", end_section=True)
    console.print(table)


def _print_bandwidth(console: Console, inspection: Inspection) -> None:
    if not inspection.links:
        console.print(
            f"{inspection.model}: all experts are in memory; nothing is moved while serving",
            highlight=False,
            markup=False,
        )
        return
    console.print(f"{inspection.model}: since the engine started", highlight=False, markup=False)
    table = Table("link", "transfers", "moved", "each", "busy", "GB/s while busy", "only waited for")
    for link in inspection.links:
        table.add_row(
            link.name.replace("_", " → "),
            str(link.num_transfers),
            _size(link.num_bytes),
            _size(link.num_bytes // max(1, link.num_transfers)),
            f"{link.busy_s:.1f} s",
            f"{link.num_bytes / link.busy_s / 1e9:.2f}" if link.busy_s > 0 else "",
            f"{link.stall_s:.1f} s",
        )
    console.print(table)


def _print_latency(console: Console, inspection: Inspection) -> None:
    if not inspection.layer_times:
        all_on_gpu = all(place == "device" for layer in inspection.placement for place in layer)
        why = "layers are not timed: the GPU that has all experts is waited for once a step" if all_on_gpu else ""
        console.print(f"{inspection.model}: {why or 'no step has run yet'}", highlight=False, markup=False)
    for times in inspection.layer_times:
        console.print(
            f"{inspection.model}: {times.phase}, means of {times.num_steps} steps, milliseconds",
            highlight=False,
            markup=False,
        )
        console.print(_latency_table(times))


def _latency_table(times: LayerTimes) -> Table:
    table = Table("layer", "compute", "waiting", "waits")
    rows = [(str(layer), *pair) for layer, pair in enumerate(zip(times.compute_s, times.stall_s, strict=True))]
    rows.append(("all", sum(times.compute_s), sum(times.stall_s)))
    for name, compute_s, stall_s in rows:
        elapsed_s = compute_s + stall_s
        share = stall_s / elapsed_s if elapsed_s > 0 else 0.0
        table.add_row(
            name, f"{1e3 * compute_s:.2f}", f"{1e3 * stall_s:.2f}", f"{share:.0%}", end_section=name == rows[-2][0]
        )
    return table


def _size(num_bytes: int) -> str:
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    if num_bytes >= 1e6:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e3:.0f} kB"
