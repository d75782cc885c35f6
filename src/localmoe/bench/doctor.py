"""What this machine can do, held against what a model needs and against the machines LocalMoE is meant for.

Two of those are described by their hardware: a workstation with one GPU, which runs a model several times larger than
the GPU from memory and a fast disk, and a server with two to four 48 GB GPUs. A machine that is below them works all
the same; it holds less or waits longer.
"""

import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from localmoe.bench.machine import (
    cpu_name,
    disk_bandwidth_bytes_s,
    gpu_copy_bytes_s,
    read_bandwidth_bytes_s,
    read_intervals_s,
)
from localmoe.bench.speeds import READ_BYTES, find_largest_store, scratch
from localmoe.core.errors import EngineStartError, ModelBuildError, StoreError
from localmoe.engine.estimate import Estimate
from localmoe.formats.store import Store
from localmoe.hardware.containers import has_container_toolkit, is_container
from localmoe.hardware.disks import disk_of
from localmoe.hardware.gpus import Gpu, find_gpus
from localmoe.hardware.memory import available_memory_bytes, total_memory_bytes
from localmoe.hardware.network import network_bits_s
from localmoe.hardware.processors import num_processors
from localmoe.tiers.config import DiskConfig

_SMALL_READ_BYTES = 4096
_MANY_READS = 32
_USUAL_BLOB_BYTES = 3 << 20
"""Of an expert, where no store says."""
_FILE_BYTES = 512 << 20

WORKSTATION, SERVER_LEAST, SERVER = "workstation", "server, at least", "server"
"""Whose hardware is wanted, beside a model's needs."""


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """What one of those wants."""

    by: str
    value: float
    """In the check's unit."""
    verdict: Literal["ok", "below", "unknown"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One property of the machine."""

    what: str
    measured: float | None
    """None: it cannot be told here."""
    unit: str
    is_limit: bool
    """The wanted values are upper limits, as of a latency."""
    wants: list[Want]
    note: str
    """How it was measured, or what to bear in mind."""
    advice: str | None
    """What to do; None where nothing is below."""


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True):
    machine: str
    checks: list[Check]
    estimate: Estimate | None
    """Of the model that was named."""
    refusal: str | None
    """Why that model would not start here."""


class ModelNeed(msgspec.Struct, frozen=True, kw_only=True):
    """What a model wants of the machine."""

    name: str
    estimate: Estimate | None
    refusal: str | None
    has_store: bool
    """It need not be made room for."""
    store_bytes: int


def check(
    what: str,
    measured: float | None,
    unit: str,
    wants: Sequence[tuple[str, float]],
    *,
    advice: str,
    note: str = "",
    is_limit: bool = False,
) -> Check:
    """Compare.

    Args:
        wants: who wants how much.
        advice: what to do if it is not there.
    """

    def verdict(value: float) -> Literal["ok", "below", "unknown"]:
        if measured is None:
            return "unknown"
        return "ok" if (measured <= value if is_limit else measured >= value) else "below"

    judged = [Want(by=by, value=value, verdict=verdict(value)) for by, value in wants]
    return Check(
        what=what,
        measured=measured,
        unit=unit,
        is_limit=is_limit,
        wants=judged,
        note=note,
        advice=advice if any(want.verdict == "below" for want in judged) else None,
    )


def examine(
    home: Path, config: DiskConfig, num_threads: int, need: ModelNeed | None, say: Callable[[str], None]
) -> DoctorReport:
    """Measure the machine and judge it.

    Args:
        home: LocalMoE's directory; its disk is measured.
        num_threads: read memory.
        say: told what is being measured.

    Raises:
        ModelBuildError: nothing can be written to `home`.
        StoreError: its disk cannot be read.
    """
    gpus = find_gpus()
    return DoctorReport(
        machine=cpu_name(),
        checks=[
            *_processor_checks(num_threads, need, say),
            *_disk_size_checks(home, need),
            *_disk_speed_checks(home, config, need, say),
            *_gpu_checks(gpus),
            *_surroundings(gpus),
        ],
        estimate=need.estimate if need else None,
        refusal=need.refusal if need else None,
    )


def _processor_checks(num_threads: int, need: ModelNeed | None, say: Callable[[str], None]) -> list[Check]:
    estimate = need.estimate if need else None
    wanted = [(f"{need.name}, all experts", estimate.whole_bytes / 1e9)] if need and estimate else []
    say("reading memory")
    bandwidth, note = None, "read by all compute threads; bounds decoding"
    try:
        bandwidth = read_bandwidth_bytes_s(num_threads, READ_BYTES) / 1e9
    except EngineStartError as error:
        note = str(error)
    return [
        check(
            "processor cores",
            num_processors(),
            "cores",
            [(SERVER_LEAST, 64), (SERVER, 128)],
            note="physical, and allowed to this process",
            advice="Expect fewer tokens per second from prompts and from many streams; a control group or affinity "
            "mask may be holding cores back.",
        ),
        check(
            "memory",
            total_memory_bytes() / 1e9,
            "GB",
            [(WORKSTATION, 96), (SERVER_LEAST, 128), (SERVER, 376)],
            advice="Choose models by `localmoe models estimate`: what does not fit in memory is read from the disk.",
        ),
        check(
            "memory available",
            available_memory_bytes() / 1e9,
            "GB",
            wanted,
            advice="Experts that do not fit come from the disk. End other programs, raise the control group's limit, "
            "choose a smaller --format, or lower max_context_tokens.",
        ),
        check(
            "memory bandwidth",
            bandwidth,
            "GB/s",
            [],
            note=note,
            advice="",
        ),
    ]


def _disk_size_checks(home: Path, need: ModelNeed | None) -> list[Check]:
    usage, disk = _usage(home), disk_of(_existing(home))
    link = disk.link if disk else None
    store = [(f"{need.name}, its store", need.store_bytes / 1e9)] if need and not need.has_store else []
    return [
        check(
            "disk size",
            usage.total / 1e9,
            "GB",
            [(WORKSTATION, 400), (SERVER_LEAST, 1000), (SERVER, 2000)],
            note=f"{disk.name}, on which {home} lies" if disk else f"behind {home}",
            advice="Fewer models fit; LOCALMOE_HOME may point to a larger disk.",
        ),
        check(
            "disk free",
            usage.free / 1e9,
            "GB",
            store,
            advice="Remove models with `localmoe models rm`, or set LOCALMOE_HOME to a directory on another disk.",
        ),
        check(
            "disk link",
            link.bytes_s / 1e9 if link else None,
            "GB/s",
            [(WORKSTATION, 15)],
            note=f"PCI Express, {link.num_lanes} lanes of {link.gt_s:g} GT/s" if link else "not told here",
            advice="Move the disk to a slot of PCI Express 5.0 with four lanes.",
        ),
    ]


def _disk_speed_checks(
    home: Path, config: DiskConfig, need: ModelNeed | None, say: Callable[[str], None]
) -> list[Check]:
    with _file_to_read(home, say) as path:
        read_bytes = _blob_bytes(path)
        say(f"reading {path}")
        bandwidth = disk_bandwidth_bytes_s(path, read_bytes, config)
        many = replace(config, queue_depth=_MANY_READS)
        reads_s = 1 / statistics.mean(read_intervals_s(path, _SMALL_READ_BYTES, many, reads_at_once=_MANY_READS))
        one = replace(config, queue_depth=1)
        latency_s = statistics.median(read_intervals_s(path, _SMALL_READ_BYTES, one, reads_at_once=1))
    wanted = [(WORKSTATION, 12.0)]
    if need and need.estimate and need.estimate.disk_gb_s_to_keep_up:
        wanted.append((f"{need.name}, to keep up", need.estimate.disk_gb_s_to_keep_up))
    return [
        check(
            "disk bandwidth",
            bandwidth / 1e9,
            "GB/s",
            wanted,
            note=f"random direct reads of {read_bytes / 2**20:.1f} MiB; in a virtual machine its host's memory may "
            f"have answered",
            advice="Give more memory, so that less is read, or put LOCALMOE_HOME on a faster disk.",
        ),
        check(
            "disk reads",
            reads_s,
            "reads/s",
            [(WORKSTATION, 100e3)],
            note=f"random direct reads of 4 KiB, {_MANY_READS} at a time, by one thread",
            advice="Nothing to do for this alone: experts are read in large pieces, so bandwidth counts for more.",
        ),
        check(
            "disk latency",
            latency_s * 1e6,
            "µs",
            [(WORKSTATION, 100)],
            note="median of random direct reads of 4 KiB, one at a time",
            is_limit=True,
            advice="Leave prefetch_layers as it is, or raise it: reading ahead hides most of it.",
        ),
    ]


def _gpu_checks(gpus: Sequence[Gpu]) -> list[Check]:
    names = ", ".join(sorted({gpu.name for gpu in gpus})) or "none found; models run on the processor"
    memories = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes is not None]
    links = [gpu.link.bytes_s for gpu in gpus if gpu.link]
    more = "Serve on the processor, or choose models by `localmoe models estimate`."
    checks = [
        check(
            "GPUs",
            len(gpus),
            "GPUs",
            [(WORKSTATION, 1), (SERVER_LEAST, 2), (SERVER, 4)],
            note=names,
            advice=more
            if not gpus
            else "One server process uses one machine's GPUs; fewer GPUs hold fewer experts.",
        )
    ]
    if not gpus:
        return checks
    copied = gpu_copy_bytes_s()
    return [
        *checks,
        check(
            "GPU memory",
            min(memories) / 1e9 if memories else None,
            "GB",
            [(WORKSTATION, 16), (SERVER_LEAST, 48), (SERVER, 48)],
            note="of the smallest" if memories else "not told here; the package nvidia-ml-py and a driver tell",
            advice="Fewer experts stay on the GPU; the others are used from memory.",
        ),
        check(
            "GPU link",
            copied / 1e9 if copied else (min(links) / 1e9 if links else None),
            "GB/s",
            [],
            note="copied from locked memory" if copied else "PCI Express, by its speed and lanes; not measured",
            advice="",
        ),
    ]


def _surroundings(gpus: Sequence[Gpu]) -> list[Check]:
    bits_s = network_bits_s()
    inside = is_container()
    return [
        check(
            "network",
            bits_s / 1e9 if bits_s else None,
            "Gbit/s",
            [(SERVER, 10)],
            note="of the fastest card with a link" if bits_s else "not told here",
            advice="Tokens need little; copying models between machines takes longer.",
        ),
        check(
            "container toolkit",
            float(has_container_toolkit()),
            "installed",
            [("containers with GPUs", 1)] if gpus and not inside else [],
            note="this is a container: its host needs it" if inside else "of NVIDIA; gives GPUs to containers",
            advice="Install the NVIDIA Container Toolkit to serve from containers.",
        ),
    ]


@contextmanager
def _file_to_read(home: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The largest store that is there, or a file that is written for it and removed again."""
    store = find_largest_store(home)
    if store is not None and store.stat().st_size >= _FILE_BYTES:
        yield store
        return
    free_bytes = _usage(home).free
    if free_bytes < 2 * _FILE_BYTES:
        raise ModelBuildError(
            f"{home}: {free_bytes / 1e9:.1f} GB are free, measuring the disk takes {2 * _FILE_BYTES / 1e9:.1f} GB; "
            f"make room, or set LOCALMOE_HOME to a directory on another disk"
        )
    say(f"writing {_FILE_BYTES / 1e9:.1f} GB to {home}, removed afterwards")
    with scratch(home) as directory:
        path = Path(directory) / "reads"
        with path.open("wb") as file:
            # Random, so that no disk compresses it; the same again and again would do for most.
            for _ in range(_FILE_BYTES // (16 << 20)):
                file.write(os.urandom(16 << 20))
            file.flush()
            os.fsync(file.fileno())
        yield path


def _blob_bytes(path: Path) -> int:
    try:
        with Store.open(path) as store:
            return store.blob_bytes
    except StoreError:
        return _USUAL_BLOB_BYTES  # not a store, or not one of today's: bytes to read all the same


def _existing(path: Path) -> Path:
    """The path, or the directory around it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _usage(home: Path) -> "shutil._ntuple_diskusage":
    return shutil.disk_usage(_existing(home))
