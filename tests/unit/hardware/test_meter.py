"""What is used, by a recording of four GPUs and by a `/proc` of the test's own."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from localmoe.core.protocols import ResourceMeter, ResourceUse
from localmoe.hardware.meter import HardwareMeter
from support.fake_nvml import FakeNvml

UNKNOWN = ResourceUse(memory_share=1.0, busy_share=1.0)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@contextmanager
def metering(root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> Iterator[HardwareMeter]:
    meter = HardwareMeter(interval_s=0.002, root=root, clock=clock)
    meter.start()
    try:
        yield meter
    finally:
        meter.stop()


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def write_proc(root: Path, busy: int, idle: int, available_kib: int = 250) -> None:
    proc = root / "proc"
    (proc / "self").mkdir(parents=True, exist_ok=True)
    (proc / "self/cgroup").write_text("")
    (proc / "meminfo").write_text(f"MemTotal: 1000 kB\nMemAvailable: {available_kib} kB\n")
    text = f"cpu {busy} 0 0 {idle} 0 0 0 0 7 7\ncpu0 0 0 0 0 0 0 0 0 0 0\n"
    new = proc / "new"
    new.write_text(text)
    new.replace(proc / "stat")  # whole, whenever it is read


def test_gpus_are_as_nvml_says(nvml: FakeNvml) -> None:
    with metering() as meter:
        until(lambda: meter.resources([1]) != UNKNOWN)
        as_meter: ResourceMeter = meter
        assert as_meter.resources([1]).memory_share == pytest.approx(12.5 * 2**30 / 48305799168, rel=1e-3)
        assert (meter.resources([1]).busy_share, meter.resources([1]).temperature_c) == (0.35, 57.0)
        both = meter.resources([0, 3])
        assert (both.busy_share, both.temperature_c) == (0.99, 89.0)
        assert both.memory_share == meter.resources([3]).memory_share
        assert nvml.is_open
    assert not nvml.is_open


def test_a_gpu_that_vanishes_is_unknown(nvml: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    with metering() as meter:
        until(lambda: meter.resources([2]) != UNKNOWN)
        nvml.sample = 4
        until(lambda: meter.resources([2]) == UNKNOWN)
        assert meter.resources([0]).temperature_c == 73.0
        assert meter.resources([0, 2]) == ResourceUse(memory_share=1.0, busy_share=1.0, temperature_c=73.0)
        looks = nvml.num_looks
        until(lambda: nvml.num_looks > looks + 3)
        assert [record.message for record in caplog.records] == ["nothing is known of GPU 2: GPU is lost"]
        nvml.sample = 0
        until(lambda: meter.resources([2]) != UNKNOWN)


def test_gpus_without_a_thermometer_and_without_a_place(nvml: FakeNvml) -> None:
    nvml.has_thermometers = False
    with metering() as meter:
        until(lambda: meter.resources([0]) != UNKNOWN)
        assert meter.resources([0]).temperature_c is None
        assert meter.resources([4]) == UNKNOWN


@pytest.mark.parametrize("has_package", [False, True])
def test_machines_without_gpus(has_package: bool, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FakeNvml.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(nvml, "nvmlInit", fail)
    if not has_package:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    with metering() as meter:
        until(lambda: meter.resources([]) != UNKNOWN)
        assert meter.resources([0]) == UNKNOWN


def test_a_driver_that_does_not_answer_holds_nobody(nvml: FakeNvml) -> None:
    now_s = 100.0
    with metering(clock=lambda: now_s) as meter:
        until(lambda: meter.resources([0]) != UNKNOWN)
        nvml.answers.clear()
        time.sleep(0.01)  # so that the thread is in the driver
        now_s = 109.0
        assert meter.resources([0]) != UNKNOWN
        now_s = 111.0
        assert meter.resources([0]) == UNKNOWN
        until(lambda: meter.resources([]) != UNKNOWN)  # the machine is still looked at
        began_s = time.monotonic()
        meter.stop()
        assert time.monotonic() - began_s < 5
        nvml.answers.set()
        until(lambda: not any(thread.name == "meter of the GPUs" for thread in threading.enumerate()))


def test_the_machine(tmp_path: Path) -> None:
    write_proc(tmp_path, busy=1000, idle=1000)
    assert HardwareMeter(root=tmp_path).resources([]) == UNKNOWN  # it has not looked yet
    with metering(tmp_path) as meter:
        until(lambda: meter.resources([]) == ResourceUse(memory_share=0.75, busy_share=0.0))
        seen = set()

        def is_seen() -> bool:
            seen.add(meter.resources([]).busy_share)
            return 0.8 in seen

        deadline_s, busy, idle = time.monotonic() + 5, 1000, 1000
        while not is_seen():  # it is busy between two looks only
            assert time.monotonic() < deadline_s
            busy, idle = busy + 80, idle + 20
            write_proc(tmp_path, busy, idle)
            time.sleep(0.001)
        assert seen <= {0.0, 0.8}
        until(lambda: meter.resources([]).busy_share == 0.0)  # what was before does not count


def test_what_cannot_be_read_is_unknown_until_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    write_proc(tmp_path, busy=0, idle=0)
    with metering(tmp_path, lambda: now_s) as meter:
        until(lambda: meter.resources([]) != UNKNOWN)
        (tmp_path / "proc/stat").unlink()
        until(lambda: "cannot look at the machine" in caplog.text)
        now_s = 11.0
        assert meter.resources([]) == UNKNOWN
        write_proc(tmp_path, busy=0, idle=0)
        until(lambda: meter.resources([]) != UNKNOWN)
    assert len(caplog.records) == 1
