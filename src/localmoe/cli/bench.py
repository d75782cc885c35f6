"""`localmoe bench`: how fast this machine computes, held against how fast it reads memory."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from localmoe.cli import bench_tables
from localmoe.cli.progress import progress_bars
from localmoe.cli.terminal import say
from localmoe.config.settings import load_settings
from localmoe.core.model import WeightFormat
from localmoe.engine.config import EngineConfig

if TYPE_CHECKING:
    from localmoe.bench.cache import CacheReport
    from localmoe.bench.engine import EngineReport
    from localmoe.bench.gateway import GatewayReport
    from localmoe.bench.gpu import GpuReport
    from localmoe.bench.kernels import KernelReport
    from localmoe.bench.tiers import TiersReport
    from localmoe.kernels.base import Kernels

app = typer.Typer(no_args_is_help=True, help="Measure this machine: the engine, or its kernels one by one.")

Weights = Annotated[
    Literal["mxfp4", "nvfp4", "int8", "bf16"],
    typer.Option("--format", help="Format of the experts; a GGUF file's is mxfp4."),
]
StreamCounts = Annotated[str, typer.Option(help="Numbers of sequences to decode at once; 1 is always measured.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Compute threads; by default the server's setting, or one per core."),
]
Level = Annotated[
    str | None, typer.Option(help="Instructions to compute with, as avx2 or amx; by default the server's setting.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(
    epilog="Examples: localmoe bench engine · localmoe bench engine --shape qwen3-30b-a3b --streams 1,8 --json · "
    "localmoe bench engine --shape ~/olmoe.gguf --threads 2"
)
def engine(
    shape: Annotated[
        str,
        typer.Option(
            help="olmoe-1b-7b, qwen3-30b-a3b, the path of a config.json, or of a GGUF file of architecture olmoe or "
            "qwen3moe with MXFP4 experts and the rest Q8_0."
        ),
    ] = "olmoe-1b-7b",
    weights: Weights = "mxfp4",
    threads: Threads = None,
    level: Level = None,
    streams: StreamCounts = "1,2,4,8,16,32",
    prompt_tokens: PromptTokens = 512,
    as_json: AsJson = False,
) -> None:
    """Measure prefill and decode of whole steps, on seeded random weights or a GGUF file's, and random tokens.

    Writes a store of the weights to the directory `bench` of LOCALMOE_HOME (olmoe-1b-7b takes 4 GB, qwen3-30b-a3b
    17 GB in mxfp4) and keeps it for the next run. Contexts begin empty; nothing is speculated.
    """
    counts = _parse_streams(streams)
    from localmoe.bench.engine import Workload, check_context, check_memory, measure_engine
    from localmoe.bench.machine import require_cpu_kernels
    from localmoe.bench.shapes import find_model
    from localmoe.bench.weights import ensure_store
    from localmoe.hardware.memory import available_memory_bytes

    require_cpu_kernels()
    model, stored = find_model(shape), WeightFormat(weights)
    settings = load_settings()
    config, num_threads = settings.engine, _num_threads(threads, settings.engine)
    kernels = _kernels(config, level, num_threads)
    workload = Workload(streams=counts, prompt_tokens=prompt_tokens)
    check_context(model, workload)
    check_memory(model, stored, kernels, available_memory_bytes())
    with progress_bars() as on_progress:
        path = ensure_store(model, stored, settings.home, on_progress)
    # No bars from here on: drawing them would take time from what is measured.
    report = measure_engine(model, path, kernels, num_threads, config, workload, say)
    if as_json:
        _print_json(report)
    else:
        bench_tables.print_engine(report)


@app.command(
    epilog="Examples: localmoe bench tiers --ram-bytes 2e9 · localmoe bench tiers --shape qwen3-30b-a3b --json · "
    "localmoe bench tiers --gpu-bytes 8e9 --ram-bytes 8e9 · "
    "LOCALMOE_ENGINE__TIERS__POLICY=lru localmoe bench tiers --ram-bytes 2e9"
)
def tiers(
    shape: Annotated[str, typer.Option(help="As of `localmoe bench engine`.")] = "olmoe-1b-7b",
    weights: Weights = "mxfp4",
    gpu_bytes: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e18,
            help="GPU memory to use, as 8e9; 0: none, the processor computes everything. By default the server's "
            "settings, or what is free of the first GPU.",
        ),
    ] = None,
    ram_bytes: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=1e18,
            help="RAM to use, as 2e9; by default the server's setting, or what the machine or control group allows.",
        ),
    ] = None,
    threads: Threads = None,
    level: Level = None,
    prompt_tokens: PromptTokens = 256,
    as_json: AsJson = False,
) -> None:
    """Measure a model that does not fit in memory: experts come from the disk as they are needed.

    Uses the store that `localmoe bench engine` uses, and writes it if it is not there yet. Reads go past the page
    cache, so that what is measured is the disk. Policy, reading ahead and queue depth are the server's settings.
    """
    from localmoe.bench.engine import Workload
    from localmoe.bench.shapes import find_model
    from localmoe.bench.tiers import measure_tiers
    from localmoe.bench.weights import ensure_store
    from localmoe.hardware.memory import available_memory_bytes

    model, settings = find_model(shape), load_settings()
    gpu_kernels = _gpu_kernels(settings.engine.device, gpu_bytes)
    tiers = settings.engine.tiers
    tiers = replace(
        tiers,
        vram_bytes=math.ceil(gpu_bytes) if gpu_bytes else tiers.vram_bytes,
        ram_bytes=tiers.ram_bytes if ram_bytes is None else int(ram_bytes),
    )
    num_threads = _num_threads(threads, settings.engine)
    config = replace(settings.engine, num_threads=num_threads, tiers=tiers)
    kernels = _kernels(config, level, num_threads)
    with progress_bars() as on_progress:
        path = ensure_store(model, WeightFormat(weights), settings.home, on_progress)
    workload = Workload(streams=(1,), prompt_tokens=prompt_tokens)
    available_bytes = available_memory_bytes()
    report = measure_tiers(model, path, kernels, gpu_kernels, config, workload, available_bytes, say)
    if as_json:
        _print_json(report)
    else:
        bench_tables.print_tiers(report)


@app.command(
    epilog="Examples: localmoe bench gpu · localmoe bench gpu --shape qwen3-30b-a3b --streams 1,64 --json · "
    "localmoe bench gpu --device cuda:1"
)
def gpu(
    shape: Annotated[str, typer.Option(help="As of `localmoe bench engine`.")] = "olmoe-1b-7b",
    weights: Weights = "mxfp4",
    device: Annotated[
        str | None, typer.Option(help="Which GPU, as cuda:1; by default the server's setting, or the first.")
    ] = None,
    threads: Threads = None,
    streams: StreamCounts = "1,8,32,64",
    prompt_tokens: PromptTokens = 512,
    device_share: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Of the experts, that are on the GPU where the processor helps."),
    ] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Measure a GPU that holds a whole model: steps against its memory's bandwidth and against the processor, copies
    of experts, and the time to first token with 100 requests open at a time (128-token prompts, Poisson arrivals).
    Then with a share of the experts on it: as the split between it and the processor finds best, and with the GPU
    fetching all others, or none.

    Uses the store that `localmoe bench engine` uses, and writes it if it is not there yet.
    """
    counts = _parse_streams(streams)
    from localmoe.bench.engine import Workload
    from localmoe.bench.gpu import GpuWorkload, measure_gpu, require_gpu
    from localmoe.bench.shapes import find_model
    from localmoe.bench.streams import Streams
    from localmoe.bench.weights import ensure_store

    model, settings = find_model(shape), load_settings()
    found = require_gpu(device or settings.engine.device)
    num_threads = _num_threads(threads, settings.engine)
    config = replace(settings.engine, num_threads=num_threads)
    kernels = _kernels(config, None, num_threads)
    with progress_bars() as on_progress:
        path = ensure_store(model, WeightFormat(weights), settings.home, on_progress)
    workload = GpuWorkload(
        steps=Workload(streams=counts, prompt_tokens=prompt_tokens), streams=Streams(), device_share=device_share
    )
    report = measure_gpu(model, path, found, kernels, config, workload, say)
    if as_json:
        _print_json(report)
    else:
        bench_tables.print_gpu(report)


@app.command(
    epilog="Examples: localmoe bench kernels · localmoe bench kernels --threads 1 --level avx2 --json · "
    "localmoe bench kernels --kernels moe --shape qwen3-30b-a3b"
)
def kernels(
    shape: Annotated[
        str,
        typer.Option(help="Whose sizes: olmoe-1b-7b, qwen3-30b-a3b, or the path of a config.json or GGUF file."),
    ] = "olmoe-1b-7b",
    names: Annotated[str, typer.Option("--kernels", help="Which to measure.")] = "matrix,moe,head,attention",
    threads: Threads = None,
    level: Level = None,
    as_json: AsJson = False,
) -> None:
    """Measure each CPU kernel on matrices of a model's sizes, which rotate over 2 GiB of random weights.

    Takes about a minute and 4 GB of memory.
    """
    from localmoe.bench.machine import require_cpu_kernels

    require_cpu_kernels()  # first: the modules below cannot be imported without
    only = _parse_kernels(names)
    from localmoe.bench.kernels import measure_kernels
    from localmoe.bench.shapes import find_model
    from localmoe.core.errors import ConfigError
    from localmoe.kernels.cpu import CpuKernels

    config = load_settings().engine
    num_threads = _num_threads(threads, config)
    kernels = _kernels(config, level, num_threads)
    if not isinstance(kernels, CpuKernels):
        raise ConfigError(f"--level is {kernels.level!r}, but only the C++ kernels are measured one by one")
    report = measure_kernels(find_model(shape).shape, kernels, num_threads, say, only=only)
    if as_json:
        _print_json(report)
    else:
        bench_tables.print_kernels(report)


@app.command(
    epilog="Examples: localmoe bench cache --trace a.route.csv.gz · "
    "localmoe bench cache --trace a.route.csv.gz --budget-fraction 0.2 --json"
)
def cache(
    trace: Annotated[Path, typer.Option(help="A routing trace: CSV, plain or gzip.")],
    budgets: Annotated[
        str, typer.Option("--budget-fraction", help="Shares of the model's experts that fit in memory.")
    ] = "0.05,0.1,0.2,0.35",
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each share.")] = False,
) -> None:
    """Measure how often decoded tokens find their experts in memory, by how it is chosen which to keep.

    `lru` keeps what was used last, `lfu` what was used most, `ours` what the engine would; `belady` knows the future
    and is the most that is possible. `gap_closed` is how far from `lru` to `belady` `ours` is.
    """
    fractions = _parse_budgets(budgets)
    from localmoe.bench.cache import measure_cache
    from localmoe.residency.trace import read_trace

    uses = read_trace(trace)
    reports = [measure_cache(uses, fraction) for fraction in fractions]
    if as_json:
        for report in reports:
            _print_json(report)
    else:
        bench_tables.print_cache(reports)


@app.command(
    epilog="Examples: localmoe bench gateway · localmoe bench gateway --concurrency 128 --json",
)
def gateway(
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Streams at once.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Measure what the gateway adds to streams: delay, processor time and memory, with no engine behind it.

    Takes a minute. The tokenizer is the demo model's, which `localmoe serve` or `localmoe models build-demo` makes.
    """
    from localmoe.bench.gateway import measure_gateway
    from localmoe.catalog.catalog import DEMO_NAME, Catalog

    report = measure_gateway(concurrency, Catalog(load_settings().home).path(DEMO_NAME), say)
    if as_json:
        _print_json(report)
    else:
        bench_tables.print_gateway(report)


def _gpu_kernels(setting: str, gpu_bytes: float | None) -> "Kernels | None":
    """Kernels of the GPU that so much memory is to be used of; None where the processor computes everything.

    Raises:
        EngineStartError: a GPU is asked for and there is none, or it cannot run the kernels.
    """
    import torch

    from localmoe.bench.gpu import require_gpu
    from localmoe.kernels.select import select_device

    if gpu_bytes == 0:
        return None
    device = select_device(setting) if gpu_bytes is None else require_gpu(setting)
    if device.type == "cpu":
        return None
    from localmoe.kernels.gpu import GpuKernels

    torch.cuda.set_device(device)
    return GpuKernels(device)


def _print_json(
    report: "EngineReport | GatewayReport | GpuReport | KernelReport | TiersReport | CacheReport",
) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(report).decode())


def _parse_streams(text: str) -> tuple[int, ...]:
    counts = [count.strip() for count in text.split(",")]
    if not all(count.isascii() and count.isdigit() and 1 <= int(count) <= 1024 for count in counts):
        message = f"{text!r} is not numbers from 1 to 1024 with commas between"
        raise typer.BadParameter(message, param_hint="--streams")
    return tuple(sorted({1, *map(int, counts)}))


def _parse_kernels(text: str) -> frozenset[str]:
    from localmoe.bench.kernels import KERNELS

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in KERNELS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(KERNELS)}", param_hint="--kernels")
    return frozenset(names)


def _parse_budgets(text: str) -> list[float]:
    shares = [share.strip() for share in text.split(",")]
    if not all(re.fullmatch(r"\d?\.?\d{1,9}", share, re.ASCII) and 0 < float(share) <= 1 for share in shares):
        message = f"{text!r} is not numbers above 0 and up to 1 with commas between"
        raise typer.BadParameter(message, param_hint="--budget-fraction")
    return [float(share) for share in shares]


def _num_threads(threads: int | None, config: EngineConfig) -> int:
    """What the command line says, else the server's settings, else one for each core."""
    from localmoe.hardware.processors import num_processors

    return threads or config.num_threads or num_processors()


def _kernels(config: EngineConfig, level: str | None, num_threads: int) -> "Kernels":
    """Kernels as the server's settings say, but of the level that the command line says."""
    import torch

    from localmoe.kernels.select import select_kernels

    torch.set_num_threads(1)  # as when serving: torch's own threads would be in the way of the kernels'
    return select_kernels(level or config.cpu_level, num_threads, pin=config.pin_threads)
