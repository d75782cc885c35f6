"""Which kernels are taken, for what is asked and what the machine runs."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from localmoe.core.errors import EngineStartError
from localmoe.kernels import select
from localmoe.kernels.reference import ReferenceKernels
from localmoe.kernels.select import cpu_levels, select_device, select_kernels


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    """The reference sets torch's for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_without_the_extension_the_reference_computes_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(select, "cpu_levels", list)
    kernels = select_kernels("auto", 1, pin=False)
    assert isinstance(kernels, ReferenceKernels)
    assert kernels.name == "reference, 1 threads"
    assert torch.get_num_threads() == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_an_extension_that_is_not_there_is_nothing_to_warn_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "localmoe._cpu", None)
    assert cpu_levels() == []
    assert not caplog.records


def test_an_engine_loads_without_the_extension_what_fits_in_memory() -> None:
    program = (
        "import sys; sys.modules['localmoe._cpu'] = None\n"
        "import localmoe.bench.engine, localmoe.bench.gpu, localmoe.bench.tiers, localmoe.engine.load\n"
        "from pathlib import Path\n"
        "from localmoe.tiers.disk import DiskReader, DiskConfig\n"
        "DiskReader.open([Path(sys.executable)], DiskConfig())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "StoreError" in result.stderr.splitlines()[-1]
    assert "does not fit in memory, and to read it piece by piece takes the C++ extension" in result.stderr


def test_an_extension_that_does_not_load_is_done_without_and_a_warning_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @staticmethod
        def find_spec(name: str, *arguments: object) -> None:
            if name == "localmoe._cpu":
                raise ImportError("undefined symbol: frobnicate")

    monkeypatch.delitem(sys.modules, "localmoe._cpu", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    assert cpu_levels() == []
    assert ["undefined symbol: frobnicate" in record.message for record in caplog.records] == [True]


def test_the_reference_can_be_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    kernels = select_kernels("reference", 2, pin=False)
    assert isinstance(kernels, ReferenceKernels)
    assert kernels.level == "reference"
    assert not caplog.records


@pytest.mark.parametrize(("found", "named"), [(["avx2", "amx"], "avx2, amx, reference"), ([], "reference")])
def test_a_level_that_is_not_here_is_refused_by_naming_those_that_are(
    monkeypatch: pytest.MonkeyPatch, found: list[str], named: str
) -> None:
    monkeypatch.setattr(select, "cpu_levels", lambda: found)
    with pytest.raises(EngineStartError, match=f"'neon'.*it runs {named}$"):
        select_kernels("neon", 1, pin=False)


@pytest.mark.parametrize("pin", [False, True])
def test_every_level_of_this_machine_can_be_asked_for_and_the_last_is_the_default(pin: bool) -> None:
    cpu = pytest.importorskip("localmoe._cpu", reason="the C++ kernels were not built")
    levels = cpu.levels()
    for level in levels:
        kernels = select_kernels(level, 3, pin=False)
        assert (kernels.level, kernels.name) == (level, f"{level}, 3 threads")
    if levels:
        assert select_kernels("auto", 1, pin=pin).name == f"{levels[-1]}, 1 threads"


def test_what_the_processor_announces_computes_rightly() -> None:
    """A level that fails its own check at start is left out, and its tests would be."""
    cpu = pytest.importorskip("localmoe._cpu", reason="the C++ kernels were not built")
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().partition("flags")[2].partition("\n")[0].split() if cpuinfo.exists() else []
    announced = {"avx2", "avx_vnni", "avx512_vnni"} & {*flags} if {"avx2", "fma", "f16c"} <= {*flags} else set()
    assert announced <= {*cpu.levels()}


def has_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], triton: bool = True) -> None:
    """Make this a machine with GPUs of these compute capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(select, "find_spec", lambda name: object() if triton else None)


def test_the_first_gpu_that_runs_the_kernels_is_the_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_gpus(monkeypatch, (7, 5), (9, 0), (12, 0))
    assert select_device("auto") == torch.device("cuda", 1)
    assert not caplog.records
    assert select_device("cuda:2") == torch.device("cuda", 2)
    assert select_device("cpu") == torch.device("cpu")


def test_a_machine_without_a_gpu_computes_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_gpus(monkeypatch)
    assert select_device("auto") == torch.device("cpu")
    assert not caplog.records
    with pytest.raises(EngineStartError, match=r"'cuda', but torch .* finds 0 CUDA devices"):
        select_device("cuda")


def test_a_gpu_that_is_too_old_is_left_alone_and_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_gpus(monkeypatch, (7, 5))
    assert select_device("auto") == torch.device("cpu")
    reason = "the kernels need compute capability 8.0, and GPU 0 has 7.5"
    assert [reason in record.message for record in caplog.records] == [True]
    with pytest.raises(EngineStartError, match=f"'cuda:0', but {reason}"):
        select_device("cuda:0")


def test_without_triton_no_gpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(monkeypatch, (9, 0), triton=False)
    assert select_device("auto") == torch.device("cpu")
    with pytest.raises(EngineStartError, match=r"Triton, .* is not installed"):
        select_device("cuda")
