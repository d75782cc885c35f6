"""Writing an expert store fails cleanly: a whole file appears at its store_path, or none."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from store_samples import SHAPE, fill, matrices, write

from localmoe.core.errors import CheckpointError, ModelBuildError, StoreError
from localmoe.core.model import ExpertId, WeightFormat
from localmoe.formats.store import Store
from localmoe.formats.store_layout import MAX_HEADER_BYTES, data_start, plan_header
from localmoe.formats.store_writer import StoreWriter


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """A store_path in an empty directory that is empty again at the end."""
    yield tmp_path / "m.store"
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_noticed_before_the_work(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelBuildError, match=r"m\.store: .*No space left on device"):
        write(empty)


@pytest.mark.parametrize("num_writes", [0, 5, 20, 23])
def test_failing_write_leaves_nothing(empty: Path, monkeypatch: pytest.MonkeyPatch, num_writes: int) -> None:
    real = os.pwrite
    written: list[int] = []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if len(written) == num_writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(offset)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ModelBuildError, match="No space left on device"):
        write(empty)
    assert len(written) == num_writes


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_failing_end_leaves_nothing(empty: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(ModelBuildError, match="Input/output error"):
        write(empty)


def test_short_writes_are_continued(store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    assert write(tmp_path / "other").read_bytes() == store_path.read_bytes()


def interrupted_matrices() -> Iterator[torch.Tensor]:
    yield torch.ones(32, 64)
    raise KeyboardInterrupt


def test_interrupted_writer_leaves_nothing(empty: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        StoreWriter(empty, shape=SHAPE, weights=WeightFormat.F32, source="") as writer,
    ):
        writer.write_expert(ExpertId(0, 0), *interrupted_matrices())


def test_incomplete_store_is_not_finished(empty: Path) -> None:
    with (
        pytest.raises(ModelBuildError, match="22 tensors or experts were not written"),
        StoreWriter(empty, shape=SHAPE, weights=WeightFormat.F32, source="") as writer,
    ):
        writer.write_expert(ExpertId(0, 0), *matrices(ExpertId(0, 0)))


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_nan_is_never_stored(empty: Path, weights: WeightFormat) -> None:
    bad = matrices(ExpertId(0, 0))
    bad[2][1, 1] = torch.nan
    with pytest.raises(CheckpointError), StoreWriter(empty, shape=SHAPE, weights=weights, source="") as writer:
        writer.write_expert(ExpertId(0, 0), *bad)
    with pytest.raises(CheckpointError), StoreWriter(empty, shape=SHAPE, weights=weights, source="") as writer:
        writer.write_dense("final_norm", torch.full((64,), torch.inf))


@pytest.mark.parametrize("weights", [WeightFormat.NVFP4, WeightFormat.MXFP4, WeightFormat.INT8])
def test_shape_that_blocks_cannot_have_is_refused_at_once(empty: Path, weights: WeightFormat) -> None:
    shape = msgspec.structs.replace(SHAPE, expert_size=48)
    with pytest.raises(StoreError, match=f"expert_size 48 does not divide into blocks of 32, as {weights}"):
        StoreWriter(empty, shape=shape, weights=weights, source="")
    StoreWriter(empty, shape=shape, weights=WeightFormat.BF16, source="")


def test_shape_with_more_experts_than_a_header_can_list_is_refused_at_once(empty: Path) -> None:
    shape = msgspec.structs.replace(SHAPE, num_layers=2**30, num_experts=2**30)
    with pytest.raises(StoreError, match="262144 in all is most"):
        StoreWriter(empty, shape=shape, weights=WeightFormat.MXFP4, source="")


def test_header_of_the_most_experts_stays_under_its_limit() -> None:
    shape = msgspec.structs.replace(SHAPE, num_layers=2**9, num_experts=2**9)
    header = plan_header(shape, WeightFormat.NVFP4, "")
    assert data_start(header) <= MAX_HEADER_BYTES


def test_source_that_is_not_unicode_is_made_so(tmp_path: Path) -> None:
    path = tmp_path / "m.store"
    with StoreWriter(path, shape=SHAPE, weights=WeightFormat.NVFP4, source="m\udcff") as writer:
        fill(writer)
    with Store.open(path) as store:
        assert store.source == "m?"


def test_directory_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelBuildError, match="No such file or directory"):
        write(tmp_path / "absent" / "m.store")


def test_failed_rewrite_leaves_the_old_store(store_path: Path, store_bytes: bytes) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        StoreWriter(store_path, shape=SHAPE, weights=WeightFormat.F32, source="") as writer,
    ):
        writer.write_expert(ExpertId(0, 0), *interrupted_matrices())
    assert store_path.read_bytes() == store_bytes
    assert list(store_path.parent.iterdir()) == [store_path]


def test_open_store_survives_being_replaced(store_path: Path) -> None:
    with Store.open(store_path) as store:
        write(store_path, WeightFormat.F32)
        store.verify(lambda done, total: None)
    with Store.open(store_path) as store:
        assert store.weights is WeightFormat.F32


def test_abandoned_partial_files_are_removed_and_live_ones_are_not(tmp_path: Path) -> None:
    store_path = tmp_path / "m.store"
    abandoned = tmp_path / "m.store.0123456789abcdef.partial"
    strangers = [tmp_path / "other.store.0123456789abcdef.partial", tmp_path / "m.store.backup.partial"]
    for file in (abandoned, *strangers):
        file.write_bytes(b"x")
    with StoreWriter(store_path, shape=SHAPE, weights=WeightFormat.F32, source="first") as first:
        assert not abandoned.exists()
        write(store_path)
        fill(first)
    with Store.open(store_path) as store:
        assert store.source == "first"
    assert sorted(tmp_path.iterdir()) == sorted([store_path, *strangers])


SCRIPT = """
    import os, resource, signal, sys
    from pathlib import Path
    import msgspec, torch
    from localmoe.core.errors import ModelBuildError
    from localmoe.core.model import ExpertId, ModelShape, WeightFormat
    from localmoe.formats.store_writer import StoreWriter

    store_path, action, shape = Path(sys.argv[1]), sys.argv[2], msgspec.json.decode(sys.argv[3], type=ModelShape)
    if action == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    try:
        with StoreWriter(store_path, shape=shape, weights=WeightFormat.BF16, source="") as writer:
            writer.write_expert(ExpertId(0, 0), torch.ones(32, 64), torch.ones(32, 64), torch.ones(64, 32))
            os.kill(os.getpid(), signal.SIGKILL)
    except ModelBuildError as error:
        sys.exit(f"refused: {error}")
"""


def run_script(store_path: Path, action: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(store_path), action, msgspec.json.encode(SHAPE).decode()]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_file_size_limit_of_the_system_leaves_nothing(empty: Path) -> None:
    result = run_script(empty, "limit")
    assert "refused: " in result.stderr
    assert "File too large" in result.stderr


def test_killed_writer_leaves_no_store_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    store_path = tmp_path / "m.store"
    assert run_script(store_path, "kill").returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("m.store.*.partial"))) == 1
    assert not store_path.exists()
    write(store_path)
    assert list(tmp_path.iterdir()) == [store_path]
