"""The NVIDIA GPUs of this machine, as the kernel and, where its Python package is installed, NVML know them."""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localmoe.hardware.pcie import PcieLink, pcie_link

logger = logging.getLogger(__name__)

_NVIDIA = 0x10DE
_DISPLAY, _ACCELERATOR = 0x03, 0x12
"""PCI base classes."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    address: str
    """On the PCI bus, as 0000:01:00.0."""
    name: str
    memory_bytes: int | None
    """None: nobody says."""
    link: PcieLink | None


def find_gpus(root: Path = Path("/")) -> list[Gpu]:
    """All of them, whether or not a driver is there.

    Args:
        root: where `proc/` and `sys/` are; tests point it elsewhere.
    """
    gpus = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, base_class = (int((device / name).read_text(), 16) for name in ("vendor", "class"))
        if vendor == _NVIDIA and base_class >> 16 in (_DISPLAY, _ACCELERATOR):
            gpus.append(
                Gpu(
                    address=device.name,
                    name=_name(root / "proc/driver/nvidia/gpus" / device.name / "information"),
                    memory_bytes=None,
                    link=pcie_link(device.resolve()),
                )
            )
    return [_ask_nvml(gpu) for gpu in gpus]


@contextmanager
def open_nvml() -> Iterator[Any]:
    """NVML's Python module, started; None where it is not installed or does not start."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        yield None
        return
    except nvml.NVMLError as error:
        logger.info("NVML does not start: %s", error)
        yield None
        return
    try:
        yield nvml
    finally:
        with suppress(nvml.NVMLError):  # a driver that is gone has nothing to shut down
            nvml.nvmlShutdown()


@contextmanager
def watch_utilisation(uuid: str) -> Iterator[Callable[[], float] | None]:
    """Within, a call gives the share of recent time, from a sixth of a second to a second, in which a GPU computed.

    None where nobody tells: NVML's Python package is not installed, or it does not know the GPU.

    Args:
        uuid: the GPU's, without the prefix `GPU-`.
    """
    with open_nvml() as nvml:
        if nvml is None:
            yield None
            return
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            nvml.nvmlDeviceGetUtilizationRates(handle)
        except nvml.NVMLError as error:
            logger.info("NVML does not know GPU %s: %s", uuid, error)
            yield None
            return
        yield lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100


def _name(information: Path) -> str:
    if not information.exists():
        return "NVIDIA GPU"
    lines = (line.partition(":") for line in information.read_text().splitlines())
    return {key: value.strip() for key, _, value in lines}.get("Model", "NVIDIA GPU")


def _ask_nvml(gpu: Gpu) -> Gpu:
    with open_nvml() as nvml:
        if nvml is None:
            return gpu
        try:
            handle = nvml.nvmlDeviceGetHandleByPciBusId(gpu.address.encode())
            name, memory = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            logger.info("NVML does not know %s: %s", gpu.address, error)
            return gpu
    return replace(gpu, name=name if isinstance(name, str) else name.decode(), memory_bytes=int(memory.total))
