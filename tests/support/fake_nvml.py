"""NVML as a recording has it."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

L40S = Path(__file__).parents[1] / "data/nvml_l40s.json"


class FakeNvml:
    """Stands for the module `pynvml`; says what one sample of a recording has."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, path: Path = L40S) -> None:
        self._recording = json.loads(path.read_text())
        self.sample = 0
        """Which one is now."""
        self.has_thermometers = True
        self.num_looks = 0
        self.answers = threading.Event()
        """Cleared, the driver answers no more."""
        self.answers.set()
        self.is_open = False

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name, as below
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self.answers.wait()
        self.num_looks += 1
        return len(self._recording["names"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        used = self._of(handle)["memory_used_bytes"]
        return SimpleNamespace(total=self._recording["memory_total_bytes"], used=used)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=self._of(handle)["utilization_percent"])

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        if not self.has_thermometers:
            raise self.NVMLError("Not Supported")
        return int(self._of(handle)["temperature_c"])

    def _of(self, handle: int) -> dict[str, Any]:
        gpu: dict[str, Any] = self._recording["samples"][self.sample][handle]
        if "error" in gpu:
            raise self.NVMLError(gpu["error"])
        return gpu
