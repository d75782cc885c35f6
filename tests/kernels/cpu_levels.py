"""The C++ kernels under test: every level of instructions that this machine runs."""

from functools import cache

import pytest

from localmoe.core.model import WeightFormat

_cpu = pytest.importorskip("localmoe._cpu", reason="the C++ kernels were not built")

from localmoe.kernels.cpu import CpuKernels  # noqa: E402

LEVELS: list[str] = _cpu.levels()
if not LEVELS:
    pytest.skip("this machine runs none of the C++ kernels", allow_module_level=True)
EVERYWHERE = [(level, num_threads) for level in LEVELS for num_threads in (1, 2, 3)]
"""Whatever the level and the number of threads, the bits are the same."""

each_level = pytest.mark.parametrize("level", LEVELS)
each_format = pytest.mark.parametrize("weights", list(WeightFormat))


@cache
def cpu_kernels(level: str, num_threads: int = 2) -> CpuKernels:
    return CpuKernels(level, num_threads, pin=False)
