"""What `localmoe bench` prints of its reports."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from localmoe.bench.cache import CacheReport
    from localmoe.bench.engine import EngineReport
    from localmoe.bench.gateway import GatewayReport
    from localmoe.bench.gpu import GpuReport
    from localmoe.bench.kernels import KernelReport
    from localmoe.bench.tiers import TiersReport


def print_engine(report: "EngineReport") -> None:
    """Steps by the number of streams."""
    console = Console()
    console.print(
        f"{report.shape}, {report.format}, on {report.machine}: {report.level}, {report.threads} threads, which read "
        f"{report.read_bandwidth_gb_s:.1f} GB/s",
        highlight=False,
    )
    console.print(
        f"prefill of {report.prompt_tokens} tokens: {report.prefill_tok_s:.0f} tok/s; a decoded token takes "
        f"{report.bytes_per_token / 1e6:.0f} MB and shares {report.overlap:.0%} of its experts with the one before",
        highlight=False,
    )
    table = Table(
        "streams", "tok/s", "experts a layer", "MB a step", "GB/s", "of the roof", "ms more by a grammar"
    )
    for count, rate in report.aggregate_tok_s.items():
        table.add_row(
            str(count),
            f"{rate:.1f}",
            f"{report.distinct_experts[count]:.1f}",
            f"{report.step_bytes[count] / 1e6:.0f}",
            f"{report.read_gb_s[count]:.1f}",
            f"{report.roof_fraction[count]:.0%}",
            f"{report.grammar_ms[count]:.2f}" if report.grammar_ms else "-",
        )
    console.print(table)


def print_gpu(report: "GpuReport") -> None:
    """What a GPU reached."""
    console, links, steps, served = Console(), report.links, report.steps, report.served
    utilisation = "NVML does not say how busy" if served.utilisation is None else f"{served.utilisation:.0%} busy"
    for line in (
        f"{report.shape}, {report.format}, on {report.gpu}, which reads {links.read_bandwidth_gb_s:.0f} GB/s; "
        f"beside it {report.cpu}",
        f"copies to the GPU: {links.pinned_copy_gb_s:.1f} GB/s, experts {links.expert_copy_gb_s:.1f} GB/s "
        f"({links.expert_copy_fraction:.0%})",
        f"prefill of {steps.prompt_tokens} tokens: {steps.prefill_tok_s:.0f} tok/s",
        f"{served.streams} streams of {served.prompt_tokens} + {served.output_tokens} tokens: "
        f"{served.saturated_tok_s:.0f} tok/s, {utilisation}; at {served.arrivals_s:.1f} arrivals a second, the first "
        f"token comes after {served.mean_first_token_ms:.0f} ms (95 % within {served.p95_first_token_ms:.0f} ms)",
    ):
        console.print(line, highlight=False)
    table = Table("streams", "tok/s", "MB a step", "of the roof", "tok/s on the processor")
    for count, rate in steps.aggregate_tok_s.items():
        table.add_row(
            str(count),
            f"{rate:.1f}",
            f"{steps.step_bytes[count] / 1e6:.0f}",
            f"{steps.roof_fraction[count]:.0%}",
            f"{steps.cpu_aggregate_tok_s[count]:.1f}",
        )
    console.print(table)
    console.print(f"with {report.device_share:.0%} of the experts on the GPU, tok/s:", highlight=False)
    table = Table("streams", "split", "fetches all", "fetches none", "by the better")
    for count, rates in report.hybrid_tok_s.items():
        found, *others = (rates[name] for name in ("automatic", "fetch_all", "fetch_none"))
        table.add_row(str(count), *(f"{rate:.1f}" for rate in (found, *others)), f"{found / max(others):.2f}")
    console.print(table)


def print_tiers(report: "TiersReport") -> None:
    """What a model larger than memory reached."""
    console = Console()
    gpu = f", {report.num_device_slots} on {report.gpu}" if report.gpu else ""
    for line in (
        f"{report.shape}, {report.format}, on {report.machine}: {report.level}, {report.threads} threads, "
        f"{report.num_slots} of {report.num_experts} experts in memory{gpu}, policy {report.policy}",
        f"prefill of {report.prompt_tokens} tokens: {report.prefill_tok_s:.0f} tok/s, "
        f"the disk at {report.prefill_disk_gb_s:.2f} GB/s",
        f"decode: {report.decode_tok_s:.2f} tok/s; {report.hit_rate:.0%} of the experts were in memory, "
        f"{report.missed_bytes_per_token / 1e6:.0f} MB a token were not, and {report.read_bytes_per_token / 1e6:.0f} "
        f"MB were read",
        f"a token computes {report.compute_ms:.1f} ms and waits {report.stall_ms:.1f} ms for the disk, which reads "
        f"{report.disk_gb_s:.2f} GB/s: {report.limit_fraction:.0%} of the limit",
    ):
        console.print(line, highlight=False)


def print_gateway(report: "GatewayReport") -> None:
    """What it adds, and what is possible without it."""
    console = Console()
    console.print(f"{report.machine}: {report.concurrency} streams", highlight=False)
    table = Table("milliseconds", "median", "99th percentile")
    for name, p50_ms, p99_ms in (
        ("added to an event", report.added_ms_p50, report.added_ms_p99),
        ("added to the first event", report.added_first_ms_p50, report.added_first_ms_p99),
        ("an event without the gateway", report.direct.p50_ms, report.direct.p99_ms),
        ("the first event without it", report.direct.first_p50_ms, report.direct.first_p99_ms),
    ):
        table.add_row(name, f"{p50_ms:.2f}", f"{p99_ms:.2f}")
    console.print(table)
    for line in (
        f"{report.tokens_per_s:,.0f} tokens/s through one process, one event a token",
        f"{report.bytes_per_stream / 1000:.1f} kB for a silent stream",
    ):
        console.print(line, highlight=False)


def print_cache(reports: "list[CacheReport]") -> None:
    """Hit rates by budget."""
    console = Console()
    console.print(f"{reports[0].model}: {reports[0].num_uses} uses by decoded tokens", highlight=False)
    table = Table("budget", "experts", "lru", "lfu", "ours", "belady", "gap closed")
    for report in reports:
        rates = (report.lru, report.lfu, report.ours, report.belady)
        table.add_row(
            f"{report.budget_fraction:.0%}",
            str(report.num_slots),
            *(f"{rate:.1%}" for rate in rates),
            "" if report.gap_closed is None else f"{report.gap_closed:.0%}",
        )
    console.print(table)


def print_kernels(report: "KernelReport") -> None:
    """A row for each kernel."""
    console = Console()
    console.print(
        f"{report.machine}: {report.level}, {report.threads} threads, "
        f"which read {report.read_bandwidth_gb_s:.1f} GB/s",
        highlight=False,
    )
    table = Table("kernel", "format", "tokens", "context", "us", "GB/s", "of the roof", "GFLOP/s")
    for row in report.kernels:
        table.add_row(
            row.kernel,
            row.format.value,
            str(row.tokens),
            "" if row.context_tokens is None else str(row.context_tokens),
            f"{row.median_us:.0f}",
            "" if row.gb_s is None else f"{row.gb_s:.1f}",
            "" if row.roof_fraction is None else f"{row.roof_fraction:.0%}",
            f"{row.gflop_s:.0f}",
        )
    console.print(table)
