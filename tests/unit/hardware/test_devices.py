"""Devices as sysfs shows them: a GPU and a disk behind their ports, cards without a link, containers."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from localmoe.hardware.containers import has_container_toolkit, is_container
from localmoe.hardware.disks import disk_of
from localmoe.hardware.gpus import find_gpus, watch_utilisation
from localmoe.hardware.network import network_bits_s
from localmoe.hardware.pcie import PcieLink, pcie_link

PORT = {"max_link_speed": "16.0 GT/s PCIe\n", "max_link_width": "8\n"}


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def link_to(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_a_link_is_as_fast_as_its_slower_end(tmp_path: Path) -> None:
    port = write(tmp_path / "port", **PORT)
    card = write(port / "card", max_link_speed="32.0 GT/s PCIe\n", max_link_width="16\n")
    link = pcie_link(write(card / "nvme0" / "nvme0n1"))
    assert link == PcieLink(gt_s=16.0, num_lanes=8)
    assert link.bytes_s == pytest.approx(15.75e9, rel=1e-3)


@pytest.mark.parametrize(("speed", "lanes", "bytes_s"), [("5.0 GT/s", "4", 2e9), ("32.0 GT/s PCIe", "4", 15.75e9)])
def test_codes_of_the_generations(tmp_path: Path, speed: str, lanes: str, bytes_s: float) -> None:
    link = pcie_link(write(tmp_path, max_link_speed=speed, max_link_width=lanes))
    assert link is not None
    assert link.bytes_s == pytest.approx(bytes_s, rel=1e-3)


@pytest.mark.parametrize(("speed", "lanes"), [("Unknown\n", "0\n"), ("\n", "4\n"), ("8.0 GT/s PCIe\n", "255\n")])
def test_a_link_that_nothing_is_known_of(tmp_path: Path, speed: str, lanes: str) -> None:
    assert pcie_link(write(tmp_path / "a", max_link_speed=speed, max_link_width=lanes)) is None
    assert pcie_link(write(tmp_path / "b")) is None


@pytest.fixture
def root_with_gpu(tmp_path: Path) -> Path:
    port = write(tmp_path / "sys/devices/port", **PORT)
    devices = {
        "0000:01:00.0": write(port / "gpu", vendor="0x10de\n", **{"class": "0x030200\n"}, **PORT),
        "0000:01:00.1": write(port / "sound", vendor="0x10de\n", **{"class": "0x040300\n"}),
        "0000:02:00.0": write(port / "other", vendor="0x1234\n", **{"class": "0x030000\n"}),
    }
    for address, folder in devices.items():
        link_to(tmp_path / "sys/bus/pci/devices" / address, folder)
    write(tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0", information="Model: \t\t NVIDIA L40S\nIRQ: 5\n")
    return tmp_path


def test_gpus_without_nvml(root_with_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    (gpu,) = find_gpus(root_with_gpu)
    assert (gpu.address, gpu.name, gpu.memory_bytes) == ("0000:01:00.0", "NVIDIA L40S", None)
    assert gpu.link == PcieLink(gt_s=16.0, num_lanes=8)
    assert find_gpus(root_with_gpu / "nothing") == []


class NvmlError(Exception):
    pass


def fake_nvml(works: bool) -> SimpleNamespace:
    def init() -> None:
        if not works:
            raise NvmlError("Driver Not Loaded")

    def by_uuid(uuid: bytes) -> bytes:
        if uuid != b"GPU-12-34":
            raise NvmlError("Not Found")
        return uuid

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda address: address,
        nvmlDeviceGetName=lambda address: f"GPU at {address.decode()}",
        nvmlDeviceGetMemoryInfo=lambda address: SimpleNamespace(total=48 << 30),
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=73, memory=12),
    )


@pytest.mark.parametrize(
    ("works", "expected"), [(True, ("GPU at 0000:01:00.0", 48 << 30)), (False, ("NVIDIA L40S", None))]
)
def test_gpus_with_nvml(
    root_with_gpu: Path, monkeypatch: pytest.MonkeyPatch, works: bool, expected: tuple[str, int | None]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(works))
    (gpu,) = find_gpus(root_with_gpu)
    assert (gpu.name, gpu.memory_bytes) == expected


def test_how_busy_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for nvml, uuid in ((None, "12-34"), (fake_nvml(False), "12-34"), (fake_nvml(True), "56-78")):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        with watch_utilisation(uuid) as look:
            assert look is None
    with watch_utilisation("12-34") as look:
        assert look is not None
        assert look() == pytest.approx(0.73)


def test_the_disk_of_a_partition(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    block = f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    assert disk_of(tmp_path, tmp_path) is None
    card = write(tmp_path / "sys/devices/card", **PORT)
    partition = write(card / "nvme0n1/nvme0n1p2", partition="2\n")
    link_to(tmp_path / block, partition)
    disk = disk_of(tmp_path, tmp_path)
    assert disk is not None
    assert (disk.name, disk.link) == ("nvme0n1", PcieLink(gt_s=16.0, num_lanes=8))


def test_the_fastest_card_that_has_a_link(tmp_path: Path) -> None:
    assert network_bits_s(tmp_path) is None
    cards = tmp_path / "sys/class/net"
    write(cards / "virtio" / "device")
    write(cards / "virtio", speed="-1\n")
    assert network_bits_s(tmp_path) is None
    for name, speed in (("eth0", "1000"), ("eth1", "25000")):
        write(cards / name / "device")
        write(cards / name, speed=speed)
    write(cards / "bridge", speed="100000\n")
    write(cards / "unplugged" / "device")
    (cards / "unplugged" / "speed").mkdir()  # reading fails, as the kernel lets it
    assert network_bits_s(tmp_path) == 25e9


def test_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_container(tmp_path)
    write(tmp_path / "run", **{".containerenv": ""})
    assert is_container(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_container_toolkit()
    write(tmp_path, **{"nvidia-ctk": "#!/bin/sh\n"})
    (tmp_path / "nvidia-ctk").chmod(0o755)
    assert has_container_toolkit()
