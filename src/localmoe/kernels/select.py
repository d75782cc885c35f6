"""Which kernels this machine computes with, and on which device."""

import logging
from importlib.util import find_spec

import torch

from localmoe.core.errors import EngineStartError
from localmoe.kernels.base import Kernels

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)
"""Of a GPU that runs the kernels: Ampere and later."""


def select_device(setting: str) -> torch.device:
    """Where to compute.

    Args:
        setting: `cpu`, `cuda`, `cuda:N`, or `auto`: the first GPU that runs the kernels, else the processor.

    Raises:
        EngineStartError: the GPU asked for is not here, or cannot run the kernels.
    """
    if setting == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        found = [index for index in range(num_gpus) if _why_not(index) is None]
        for index in range(num_gpus if not found else 0):
            logger.warning("computing on the processor: %s", _why_not(index))
        return torch.device("cuda", found[0]) if found else torch.device("cpu")
    index = torch.device(setting).index or 0
    if index >= num_gpus:
        raise EngineStartError(
            f"device is {setting!r}, but torch {torch.__version__} finds {num_gpus} CUDA devices here; set device to "
            f"auto or cpu, or install a build of torch for CUDA and a driver"
        )
    if reason := _why_not(index):
        raise EngineStartError(f"device is {setting!r}, but {reason}")
    return torch.device("cuda", index)


def _why_not(index: int) -> str | None:
    """What keeps a GPU from running the kernels."""
    if find_spec("triton") is None:
        return "Triton, which the GPU kernels are written in, is not installed"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
        return f"the kernels need compute capability {least}, and {torch.cuda.get_device_name(index)} has {found}"
    return None


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
