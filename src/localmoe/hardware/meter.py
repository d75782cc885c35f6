"""How much of the machine and of its GPUs is used, looked at once a second.

Two threads look, one at the machine and one at the GPUs, because a driver may answer late or never. Each replaces its
last sample by a new one, whole, so that readers need no lock and wait for nobody. What is too old, or could not be
read, is unknown, and counts as fully used: whoever looks for what is least used takes what is known first, and where
nothing is known all are alike.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from localmoe.core.protocols import MemoryLeft, ResourceUse
from localmoe.hardware.gpus import open_nvml
from localmoe.hardware.memory import available_memory_bytes, total_memory_bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")
Look = Callable[[], T]

_MAX_AGE_S = 10.0
_STOP_WAIT_S = 0.2
_UNKNOWN = ResourceUse(memory_share=1.0, busy_share=1.0)


class HardwareMeter:
    """A `ResourceMeter` of this machine. GPUs have NVML's numbers, which count all of the machine's by PCI address.

    Args:
        interval_s: between two looks.
        root: where `proc/` and `sys/` are; tests point it elsewhere.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        interval_s: float = 1.0,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._machine = _Sampler("the machine", lambda: _look_at_machine(root), interval_s=interval_s, clock=clock)
        self._gpus = _Sampler("the GPUs", _look_at_gpus, interval_s=interval_s, clock=clock)

    def start(self) -> None:
        """Begin to look, unless that is done. What is used is known after one interval."""
        self._machine.start()
        self._gpus.start()

    def stop(self) -> None:
        """Look no more. A thread that waits for a driver is left to it."""
        self._machine.stop()
        self._gpus.stop()

    def resources(self, devices: Sequence[int]) -> ResourceUse:
        """See `ResourceMeter.resources`. What is unknown, or was last known ten seconds ago, counts as fully used and
        has no temperature."""
        if not devices:
            return self._machine.latest() or _UNKNOWN
        gpus = self._gpus.latest() or {}
        uses = [gpus.get(device, _UNKNOWN) for device in devices]
        return ResourceUse(
            memory_share=max(use.memory_share for use in uses),
            busy_share=max(use.busy_share for use in uses),
            temperature_c=max((use.temperature_c for use in uses if use.temperature_c is not None), default=None),
        )

    def memory(self) -> list[MemoryLeft]:
        """See `MemoryMeter.memory`."""
        total_bytes, available_bytes = total_memory_bytes(self._root), available_memory_bytes(self._root)
        ram = MemoryLeft(name="ram", total_bytes=total_bytes, available_bytes=available_bytes)
        return [ram, *_gpu_memory()]


class _Sampler(Generic[T]):
    """Looks again and again, in a thread of its own.

    Args:
        what: is looked at.
        open_look: gives what looks, and takes it back; None where there is nothing to look at.
    """

    def __init__(
        self,
        what: str,
        open_look: Callable[[], AbstractContextManager[Look[T] | None]],
        *,
        interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._what = what
        self._open_look = open_look
        self._interval_s = interval_s
        self._clock = clock
        self._latest: tuple[float, T] | None = None
        """When the look began, and what it saw."""
        self._stopping = threading.Event()
        # No daemon would be waited for at exit, and its driver may never answer.
        self._thread = threading.Thread(target=self._run, name=f"meter of {what}", daemon=True)

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join(_STOP_WAIT_S)

    def latest(self) -> T | None:
        """The last sample; None if there is none yet, or it is too old."""
        latest = self._latest
        return None if latest is None or self._clock() - latest[0] > _MAX_AGE_S else latest[1]

    def _run(self) -> None:
        works = True
        with self._open_look() as look:
            if look is None:
                return
            while not self._stopping.wait(self._interval_s):
                began_s = self._clock()
                try:
                    self._latest = (began_s, look())
                    works = True
                except Exception:
                    # Its sample gets old, and with that unknown; the next look may see something again.
                    if works:
                        logger.exception("cannot look at %s", self._what)
                    works = False


@contextmanager
def _look_at_machine(root: Path) -> Iterator[Look[ResourceUse]]:
    before = _processor_times(root)

    def look() -> ResourceUse:
        nonlocal before
        now = _processor_times(root)
        busy, idle = now[0] - before[0], now[1] - before[1]
        before = now
        total_bytes = total_memory_bytes(root)
        return ResourceUse(
            memory_share=_share(total_bytes - available_memory_bytes(root), total_bytes),
            busy_share=_share(busy, busy + idle),
        )

    yield look


def _processor_times(root: Path) -> tuple[int, int]:
    """Ticks since the machine started that its processors were (busy, idle)."""
    ticks = [int(field) for field in (root / "proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]  # waiting for a disk is idle, too
    return sum(ticks) - idle, idle


@contextmanager
def _look_at_gpus() -> Iterator[Look[Mapping[int, ResourceUse]] | None]:
    with open_nvml() as nvml:
        if nvml is None:
            yield None
            return
        problems: dict[int, str] = {}

        def look() -> Mapping[int, ResourceUse]:
            uses = {}
            for index in range(nvml.nvmlDeviceGetCount()):
                try:
                    uses[index] = _ask(nvml, index)
                    problems.pop(index, None)
                except nvml.NVMLError as error:
                    if problems.get(index) != str(error):
                        logger.warning("nothing is known of GPU %d: %s", index, error)
                    problems[index] = str(error)
            return uses

        yield look


def _ask(nvml: Any, index: int) -> ResourceUse:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    busy_percent = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
    try:
        temperature_c = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    except nvml.NVMLError:  # virtual ones have none
        temperature_c = None
    return ResourceUse(
        memory_share=_share(memory.used, memory.total),
        busy_share=_share(busy_percent, 100),
        temperature_c=temperature_c,
    )


def _gpu_memory() -> list[MemoryLeft]:
    """Of the GPUs that tell."""
    found = []
    with open_nvml() as nvml:
        for index in range(0 if nvml is None else nvml.nvmlDeviceGetCount()):
            try:
                memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index))
            except nvml.NVMLError as error:
                logger.info("nothing is known of GPU %d: %s", index, error)
                continue
            found.append(MemoryLeft(name=f"gpu{index}", total_bytes=memory.total, available_bytes=memory.free))
    return found


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole else 0.0
