"""Reading files: every way there is gives the same bytes, every failure has a name, every choice is logged."""

import errno
import fcntl
import logging
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

pytest.importorskip("localmoe._cpu", reason="the extension was not built")

from localmoe import _cpu
from localmoe.core.errors import StoreError
from localmoe.tiers import disk
from localmoe.tiers.config import DiskConfig
from localmoe.tiers.disk import DiskReader, Done, Read
from localmoe.tiers.host import HostArena

PAGE = 4096
FILE_PAGES = 512
FILL = 0xAA

Opener = Callable[..., DiskReader[int]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.write_bytes(random.Random(1).randbytes(FILE_PAGES * PAGE))
    return path


@pytest.fixture
def memory() -> torch.Tensor:
    """Aligned for direct reads."""
    arena = HostArena(FILE_PAGES * PAGE, 1, available_memory_bytes=1 << 30)
    return arena.slot(0).fill_(FILL)


@pytest.fixture
def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    real_fcntl = fcntl.fcntl

    def refusing(descriptor: int, command: int, argument: int) -> Any:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_fcntl(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)


def refuse_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    real_reader = _cpu.DiskReader

    def refusing(files: list[int], depth: int, method: str, piece_bytes: int) -> Any:
        if method == "io_uring":
            raise RuntimeError("io_uring_setup: Operation not permitted")
        return real_reader(files, depth, method, piece_bytes)

    monkeypatch.setattr(_cpu, "DiskReader", refusing)


def config(method: Literal["auto", "io_uring", "threads"] = "auto", **other: Any) -> DiskConfig:
    return DiskConfig(**{"method": method, "queue_depth": 4, "piece_bytes": 2 * PAGE, "timeout_s": 20.0} | other)


def open_reader(path: Path, settings: DiskConfig) -> DiskReader[int]:
    try:
        return DiskReader.open([path], settings)
    except StoreError as error:
        if settings.method == "io_uring" and "cannot be read by io_uring" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(params=["registered", "unregistered", "threads", "buffered", "buffered threads"])
def reader(request: pytest.FixtureRequest, path: Path, memory: torch.Tensor) -> Iterator[DiskReader[int]]:
    """A reader of `path` for each way."""
    if "buffered" in request.param:
        request.getfixturevalue("refuse_direct")
    with open_reader(path, config("threads" if "threads" in request.param else "io_uring")) as reader:
        if request.param == "registered" and not reader.register(memory):
            pytest.skip("this process may not register memory")
        yield reader


def collect(reader: DiskReader[int], count: int) -> dict[int, str | None]:
    done: list[Done[int]] = []
    while len(done) < count:
        some = reader.collect(wait=True)
        assert some, "nothing is under way any more"
        done += some
    assert reader.collect(wait=True) == []
    return {each.key: each.error for each in done}


def read(key: int, page: int, num_pages: int, memory: torch.Tensor) -> Read[int]:
    """Into the same place of `memory` as it has in the file."""
    buffer = memory[page * PAGE : (page + num_pages) * PAGE]
    return Read(key=key, offset=page * PAGE, num_bytes=num_pages * PAGE, buffer=buffer)


def test_bytes_land_where_they_belong_and_nowhere_else(
    reader: DiskReader[int], path: Path, memory: torch.Tensor
) -> None:
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    draw = random.Random(2)
    expected = torch.full_like(memory, FILL)
    page, reads = 0, []
    while (page := page + draw.randrange(3)) < FILE_PAGES - 20:
        num_pages = draw.randrange(1, 20)
        reads.append(read(len(reads), page, num_pages, memory))
        expected[page * PAGE : (page + num_pages) * PAGE] = content[page * PAGE : (page + num_pages) * PAGE]
        page += num_pages
    draw.shuffle(reads)
    half = len(reads) // 2
    reader.submit(reads[:half])
    reader.submit(reads[half:])
    assert collect(reader, len(reads)) == dict.fromkeys(range(len(reads)))
    assert torch.equal(memory, expected)
    stats = reader.stats()
    assert (stats.num_reads, stats.in_flight) == (len(reads), 0)
    assert stats.bytes_read == sum(each.num_bytes for each in reads)
    assert stats.busy_s > 0


def test_many_reads_at_once(reader: DiskReader[int], path: Path, memory: torch.Tensor) -> None:
    for offset in range(0, 3 * FILE_PAGES, FILE_PAGES):
        reader.submit([read(offset + page, page, 1, memory) for page in range(FILE_PAGES)])
    assert collect(reader, 3 * FILE_PAGES) == dict.fromkeys(range(3 * FILE_PAGES))
    assert memory.numpy().tobytes() == path.read_bytes()


def test_the_end_of_the_file_is_an_error_of_that_read(reader: DiskReader[int], memory: torch.Tensor) -> None:
    end = FILE_PAGES * PAGE
    reader.submit(
        [
            Read(key=0, offset=end - 4 * PAGE, num_bytes=4 * PAGE, buffer=memory),
            Read(key=1, offset=end - 3 * PAGE, num_bytes=4 * PAGE, buffer=memory[8 * PAGE :]),
            Read(key=2, offset=end, num_bytes=PAGE, buffer=memory[16 * PAGE :]),
            Read(key=3, offset=1 << 40, num_bytes=9 * PAGE, buffer=memory[32 * PAGE :]),
        ]
    )
    errors = collect(reader, 4)
    assert errors[0] is None
    for key, byte in ((1, end + PAGE), (2, end + PAGE), (3, (1 << 40) + 9 * PAGE)):
        assert f"ends before byte {byte}; the file has shrunk" in str(errors[key])


@pytest.mark.parametrize("cut", [3 * PAGE, 3 * PAGE + 100, 3 * PAGE + 512])
def test_a_file_cut_short_is_found(reader: DiskReader[int], path: Path, memory: torch.Tensor, cut: int) -> None:
    os.truncate(path, cut)
    reader.submit([read(0, 0, 3, memory), read(1, 0, 4, memory), read(2, 3, 1, memory), read(3, 100, 9, memory)])
    errors = collect(reader, 4)
    assert errors.pop(0) is None
    assert all(str(path) in str(error) and "has shrunk" in str(error) for error in errors.values())


def test_a_file_that_vanishes_is_read_to_the_end(
    reader: DiskReader[int], path: Path, memory: torch.Tensor
) -> None:
    content = path.read_bytes()
    path.unlink()
    reader.submit([read(0, 0, FILE_PAGES, memory)])
    assert collect(reader, 1) == {0: None}
    assert memory.numpy().tobytes() == content


def test_cancelled_reads_are_never_made(reader: DiskReader[int], memory: torch.Tensor) -> None:
    # Four pieces of two pages are with the kernel: two reads.
    reads = [read(key, 4 * key, 4, memory) for key in range(10)]
    reader.submit(reads)
    assert reader.cancel([7, 9, 5, 1, 99]) == [5, 7, 9]
    assert reader.cancel([5]) == []
    reader.submit([reads[9]])
    assert collect(reader, 8) == dict.fromkeys([0, 1, 2, 3, 4, 6, 8, 9])
    for key in (5, 7):
        assert bool((reads[key].buffer == FILL).all())


def test_one_piece_at_a_time_keeps_the_order(path: Path, memory: torch.Tensor) -> None:
    with DiskReader[int].open([path], config(queue_depth=1)) as reader:
        reader.submit([read(key, 3 * key, 3, memory) for key in (5, 2, 8, 1)])
        done: list[Done[int]] = []
        while len(done) < 4:
            done += reader.collect(wait=True)
    assert [each.key for each in done] == [5, 2, 8, 1]


def test_nothing_is_written_after_close(reader: DiskReader[int], memory: torch.Tensor) -> None:
    reader.submit([read(key, 8 * key, 8, memory) for key in range(FILE_PAGES // 8)])
    reader.close()
    after = memory.clone()
    memory.fill_(FILL)
    assert bool((after[-8 * PAGE :] == FILL).all()), "what had not begun was dropped"
    assert not reader.stats().in_flight
    assert bool((memory == FILL).all())


def test_several_files_and_readers_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(random.Random(i).randbytes(64 * PAGE))
    failures: list[object] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        arena = HostArena(4 * PAGE, 8, available_memory_bytes=1 << 30)
        with DiskReader[int].open(paths, config()) as reader:
            for _ in range(20):
                slots = range(8)
                places = [(draw.randrange(3), draw.randrange(60) * PAGE) for _ in slots]
                reader.submit(
                    Read(key=slot, file=file, offset=offset, num_bytes=4 * PAGE, buffer=arena.slot(slot))
                    for slot, (file, offset) in zip(slots, places, strict=True)
                )
                errors = collect(reader, 8)
                for slot, (file, offset) in zip(slots, places, strict=True):
                    content = paths[file].read_bytes()[offset : offset + 4 * PAGE]
                    if errors[slot] or arena.slot(slot).numpy().tobytes() != content:
                        failures.append((seed, slot, errors[slot]))
        finished.append(seed)

    finished: list[int] = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (10, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert sorted(finished) == [10, 11]


def test_the_choice_is_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with open_reader(path, config("io_uring")):
        pass
    assert f"reads {path} by io_uring (as configured), " in caplog.text
    assert "queue depth 4 (as configured)" in caplog.text


def test_threads_where_io_uring_is_refused(
    path: Path, memory: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    refuse_io_uring(monkeypatch)
    with DiskReader[int].open([path], config()) as reader:
        assert not reader.register(memory)
        reader.submit([read(0, 0, FILE_PAGES, memory)])
        assert collect(reader, 1) == {0: None}
    assert "by threads" in caplog.text
    assert "io_uring_setup: Operation not permitted" in caplog.text
    assert f"{memory.nbytes} bytes of memory are not registered with threads" in caplog.text
    with pytest.raises(StoreError, match="cannot be read by io_uring: io_uring_setup: Operation not permitted"):
        DiskReader[int].open([path], config("io_uring"))


class StubReader:
    """Like the extension's reader, with the answers that a test wants."""

    def __init__(self, answers: list[list[tuple[int, int]]]) -> None:
        self.answers = answers
        self.is_closed = False

    def submit(self, reads: list[tuple[int, int, int, int, int]]) -> None:
        pass

    def wait(self, min_completed: int, timeout_s: float) -> list[tuple[int, int]]:
        return self.answers.pop(0) if self.answers else []

    def close(self) -> None:
        self.is_closed = True


def test_threads_where_io_uring_cannot_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    real_reader = _cpu.DiskReader
    broken = StubReader([[(0, errno.EOPNOTSUPP)]])

    def choose(files: list[int], depth: int, method: str, piece_bytes: int) -> Any:
        return broken if method == "io_uring" else real_reader(files, depth, method, piece_bytes)

    monkeypatch.setattr(_cpu, "DiskReader", choose)
    DiskReader[int].open([path], config()).close()
    assert "by threads" in caplog.text
    assert os.strerror(errno.EOPNOTSUPP) in caplog.text
    assert broken.is_closed


def test_a_dead_disk_has_a_name(path: Path, memory: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first reader tries the method, the second is the one.
    answers = [[[(0, 0)]], []]
    monkeypatch.setattr(_cpu, "DiskReader", lambda *_: StubReader(answers.pop(0)))
    with DiskReader[int].open([path], config(timeout_s=0.05)) as reader:
        reader.submit([read(0, 0, 1, memory), read(1, 0, 1, memory)])
        assert reader.collect(wait=False) == []
        with pytest.raises(StoreError, match="2 reads wait and none ended in 0"):
            reader.collect(wait=True)


@pytest.mark.usefixtures("refuse_direct")
def test_buffered_reads_are_logged_and_leave_no_second_copy(
    path: Path, memory: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *advice: advised.append(advice))
    with DiskReader[int].open([path], config()) as reader:
        reader.submit([read(0, 3, 5, memory)])
        assert collect(reader, 1) == {0: None}
    assert "buffered (O_DIRECT: Invalid argument)" in caplog.text
    assert advised == [(0, 0, os.POSIX_FADV_RANDOM), (3 * PAGE, 5 * PAGE, os.POSIX_FADV_DONTNEED)]


def test_buffered_where_direct_reads_fail(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "preadv", refuse)
    with DiskReader[int].open([path], config()):
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
        flags = [
            fcntl.fcntl(number, fcntl.F_GETFL)
            for number in descriptors
            if os.path.realpath(f"/proc/self/fd/{number}") == str(path.resolve())
        ]
        assert [each & (os.O_DIRECT | os.O_NONBLOCK) for each in flags] == [0]
    assert "buffered (O_DIRECT: Invalid argument)" in caplog.text


def test_memory_that_may_not_be_locked_is_not_registered() -> None:
    # Another user, as root may lock what it likes; after the imports, which that user may not be able to read.
    script = f"""
import os, resource, tempfile
from pathlib import Path
import torch
from localmoe.tiers.config import DiskConfig
from localmoe.tiers.disk import DiskReader, Read
from localmoe.tiers.host import HostArena
with tempfile.TemporaryDirectory() as directory:
    os.chmod(directory, 0o755)
    path = Path(directory) / "store"
    path.write_bytes(os.urandom({16 * PAGE}))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    arena = HostArena({16 * PAGE}, 4, available_memory_bytes=1 << 30)
    slot = arena.slot(0)
    with DiskReader.open([path], DiskConfig(queue_depth=4, piece_bytes=4096)) as reader:
        print("registered", reader.register(arena.memory))
        reader.submit([Read(key=0, offset=0, num_bytes={16 * PAGE}, buffer=slot)])
        print("errors", [done.error for done in reader.collect(wait=True)])
    print("same", slot.numpy().tobytes() == path.read_bytes())
    if was_root:
        os.seteuid(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=60, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.splitlines() == ["registered False", "errors [None]", "same True"]


@pytest.mark.parametrize(
    ("speeds", "depth"),
    [
        ([[0.5, 1.0, 1.8, 2.0, 1.99]], 8),
        ([[0.5, 1.0, 1.6, 1.6, 2.0]], 32),
        ([[2.6, 3.0, 3.0, 3.0, 3.0]], 2),
        # A disk that is at times faster, for whichever depth is measured then.
        ([[2.0, 2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 4.0, 8.0, 8.0], [2.0, 2.0, 2.0, 2.0, 2.0]], 2),
        ([[1.0, 2.0, 4.0, 4.0, 4.0], [4.0, 8.0, 16.0, 16.0, 16.0], [5.0, 5.0, 5.0, 5.0, 5.0]], 8),
        ([[0.0, 0.0, 0.0, 0.0, 0.0]], 2),
    ],
)
def test_the_smallest_depth_that_keeps_the_disk_busy(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    speeds: list[list[float]],
    depth: int,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(disk, "_LEAST_MEASURED_BYTES", PAGE)
    monkeypatch.setattr(disk, "_measure_depths", lambda *_: 1e9 * np.array(speeds))
    with DiskReader[int].open([path], config("threads", queue_depth=None)) as reader:
        assert reader.queue_depth == depth
    assert f"queue depth {depth} (2: {np.median(speeds, axis=0)[0]:.2f} GB/s, " in caplog.text


def test_the_depth_is_measured_on_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(disk, "_MEASURE_S", 0.05)
    DiskReader[int].open([path], config(queue_depth=None)).close()
    assert "queue depth 16 (not measured)" in caplog.text
    monkeypatch.setattr(disk, "_LEAST_MEASURED_BYTES", PAGE)
    descriptors = os.listdir("/proc/self/fd")
    DiskReader[int].open([path], config(queue_depth=None)).close()
    assert " GB/s, 32: " in caplog.text or "buffered" in caplog.text
    assert os.listdir("/proc/self/fd") == descriptors


def test_files_that_cannot_be_opened(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    descriptors = os.listdir("/proc/self/fd")
    for name in ("missing", ".", "pipe"):
        with pytest.raises(StoreError, match="cannot be opened"):
            DiskReader[int].open([path, tmp_path / name], config())
    assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize(
    "wrong",
    [{"queue_depth": 0}, {"queue_depth": 1025}, {"piece_bytes": 5000}, {"piece_bytes": 0}, {"timeout_s": 0}],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
        DiskConfig(**wrong)
