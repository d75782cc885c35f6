"""Which kernels this machine computes with."""

import logging

from localmoe.core.errors import EngineStartError
from localmoe.kernels.base import Kernels

logger = logging.getLogger(__name__)


def select_kernels(level: str, num_threads: int, *, pin: bool) -> Kernels:
    """The best kernels this machine runs, or those of a level that is asked for.

    Args:
        level: `auto`, a level of the C++ kernels, or `reference`.
        num_threads: compute threads.
        pin: keep each thread on one processor.

    Raises:
        EngineStartError: the level asked for is not here.
    """
    levels = cpu_levels()
    if level == "auto" and levels:
        level = levels[-1]
    elif level == "auto":
        logger.warning(
            "computing with plain torch, some ten times slower: this machine runs none of the C++ kernels, which "
            "need AVX2 at least, or they were not built for want of a compiler"
        )
        level = "reference"
    if level == "reference":
        from localmoe.kernels.reference import ReferenceKernels

        return ReferenceKernels(num_threads)
    if level not in levels:
        found = ", ".join([*levels, "reference"])
        raise EngineStartError(f"cpu_level is {level!r}, which this machine does not run; it runs {found}")
    from localmoe.kernels.cpu import CpuKernels

    return CpuKernels(level, num_threads, pin=pin)


def cpu_levels() -> list[str]:
    """Levels of the C++ kernels that this machine runs, the fastest last; none where they are not built."""
    try:
        import localmoe._cpu
    except ModuleNotFoundError:
        return []
    except ImportError as error:
        logger.warning("the C++ kernels are built but cannot be loaded: %s", error)
        return []
    return localmoe._cpu.levels()
