"""What figures are held against: the machine's name and how fast it reads memory."""

import time
from pathlib import Path

import numpy as np

from localmoe.core.errors import EngineStartError

READ_BYTES = 2 << 30
"""Too much for any cache to help."""


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux gives it."""
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def best_level() -> str:
    """The highest level of instructions that this machine runs.

    Raises:
        EngineStartError: there are no C++ kernels, without which nothing is measured.
    """
    try:
        from localmoe import _cpu
    except ImportError:
        levels = []
    else:
        levels = _cpu.levels()
    if not levels:
        raise EngineStartError(
            "the C++ kernels, which benchmarks need, are not here: the machine has no AVX2, or they were not built; "
            "install a C++ compiler and LocalMoE again"
        )
    return levels[-1]


def read_bandwidth_bytes_s(num_threads: int, num_bytes: int = READ_BYTES) -> float:
    """Best of five reads of a buffer by all threads. Raises EngineStartError without C++ kernels."""
    level = best_level()
    from localmoe.kernels.cpu import CpuKernels

    kernels = CpuKernels(level, num_threads, pin=False)
    data = np.ones(num_bytes, np.uint8)
    times_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        kernels.read(data)
        times_s.append(time.perf_counter() - started_s)
    return num_bytes / min(times_s)
