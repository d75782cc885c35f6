"""What figures are held against: the machine's name and how fast it reads memory."""

import time
from pathlib import Path

import numpy as np

from localmoe.core.errors import EngineStartError
from localmoe.kernels.select import cpu_levels

READ_BYTES = 2 << 30
"""Too much for any cache to help."""


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
