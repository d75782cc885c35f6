"""What figures are held against: the machine's name and how fast it reads memory."""

import statistics
import time
from pathlib import Path

import numpy as np

from localmoe.core.errors import EngineStartError, StoreError
from localmoe.kernels.select import cpu_levels
from localmoe.tiers.config import DiskConfig

READ_BYTES = 2 << 30
"""Too much for any cache to help."""
_COPY_BYTES = 256 << 20
_READS_AT_ONCE = 8
_DISK_S = 1.0
"""How long the disk is measured."""


def cpu_fields(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What Linux says about the first processor, as `flags`."""
    first, _, _ = cpuinfo.read_text().partition("\n\n")
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux gives it."""
    return cpu_fields(cpuinfo).get("model name", "unknown")


def require_cpu_kernels() -> str:
    """The best level of the C++ kernels.

    Raises:
        EngineStartError: there are none, without which nothing is measured.
    """
    levels = cpu_levels()
    if not levels:
        raise EngineStartError(
            "the C++ kernels, which benchmarks need, are not here: the machine has no AVX2, or they were not built; "
            "install a C++ compiler and LocalMoE again"
        )
    return levels[-1]


def read_bandwidth_bytes_s(num_threads: int, num_bytes: int = READ_BYTES) -> float:
    """Best of five reads of a buffer by all threads. Raises EngineStartError without C++ kernels."""
    level = require_cpu_kernels()
    from localmoe.kernels.cpu import CpuKernels

    kernels = CpuKernels(level, num_threads, pin=False)
    data = np.ones(num_bytes, np.uint8)
    times_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        kernels.read(data)
        times_s.append(time.perf_counter() - started_s)
    return num_bytes / min(times_s)


def gpu_copy_bytes_s(num_bytes: int = _COPY_BYTES) -> float | None:
    """Best of five copies from locked memory to the first GPU; None where torch can use no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    times_s = []
    for _ in range(5):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times_s.append(time.perf_counter() - started_s)
    return num_bytes / min(times_s)


def disk_bandwidth_bytes_s(path: Path, read_bytes: int, config: DiskConfig) -> float:
    """Direct reads of so many bytes at random places of a file, eight at a time, or fewer if they are large.

    Args:
        read_bytes: a multiple of 4096.

    Raises:
        StoreError: the file cannot be read.
    """
    return read_bytes / statistics.mean(read_intervals_s(path, read_bytes, config, reads_at_once=_READS_AT_ONCE))


def read_intervals_s(path: Path, read_bytes: int, config: DiskConfig, *, reads_at_once: int) -> list[float]:
    """Direct reads at random places of a file: the time from the end of one to the end of the next.

    With one at a time, that is how long each takes.

    Args:
        read_bytes: a multiple of 4096.
        reads_at_once: how many are under way at any time.

    Raises:
        StoreError: the file cannot be read, or is shorter than one read.
    """
    from localmoe.tiers.disk import DiskReader, Read
    from localmoe.tiers.host import HostArena

    num_places = path.stat().st_size // read_bytes
    if not num_places:
        raise StoreError(f"{path}: is shorter than the {read_bytes} bytes of a read")
    places = np.random.default_rng(0)
    arena = HostArena(read_bytes, reads_at_once, available_memory_bytes=1 << 40)
    intervals_s: list[float] = []
    with DiskReader[int].open([path], config) as reader:

        def begin(slots: list[int]) -> None:
            offsets = (places.integers(num_places, size=len(slots)) * read_bytes).tolist()
            reader.submit(
                Read(key=slot, offset=offset, num_bytes=read_bytes, buffer=arena.slot(slot))
                for slot, offset in zip(slots, offsets, strict=True)
            )

        begin(list(range(reads_at_once)))
        started_s = before_s = time.perf_counter()
        while before_s - started_s < _DISK_S:
            ended = reader.collect(wait=True)
            for read in ended:
                if read.error is not None:
                    raise StoreError(read.error)
            now_s = time.perf_counter()
            intervals_s += [(now_s - before_s) / len(ended)] * len(ended)
            before_s = now_s
            begin([read.key for read in ended])
    return intervals_s
