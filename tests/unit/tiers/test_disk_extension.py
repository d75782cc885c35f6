"""`_cpu.DiskReader` alone: what needs file descriptors and addresses of the test's own making.

A read of a pipe waits in io_uring until somebody writes, which makes "under way" last as long as a test likes.
"""

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_cpu = pytest.importorskip("localmoe._cpu", reason="the extension was not built")

PAGE = 4096


def make_reader(
    descriptors: list[int], *, depth: int = 8, method: str = "io_uring", piece_bytes: int = PAGE
) -> Any:
    try:
        return _cpu.DiskReader(descriptors, depth, method, piece_bytes)
    except RuntimeError as error:
        pytest.skip(str(error))


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, 64 * PAGE)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * PAGE))
    number = os.open(path, os.O_RDONLY)
    yield number
    os.close(number)


def test_wait_keeps_to_its_time(pipe: tuple[int, int], memory: mmap.mmap) -> None:
    reader = make_reader([pipe[0]])
    reader.submit([(7, 0, 0, 5, address_of(memory))])
    start = time.monotonic()
    assert reader.wait(1, 0.2) == []
    assert 0.15 < time.monotonic() - start < 5
    assert reader.wait(0, 0.0) == []
    assert reader.in_flight == 1
    os.write(pipe[1], b"abcde")
    assert reader.wait(1, 5.0) == [(7, 0)]
    assert memory[:6] == b"abcde\0"
    assert reader.busy_s > 0.15
    assert (reader.in_flight, reader.num_reads, reader.bytes_read) == (0, 1, 5)


def test_busy_time_stands_still_between_reads(descriptor: int, memory: mmap.mmap) -> None:
    reader = make_reader([descriptor])
    reader.submit([(0, 0, 0, PAGE, address_of(memory))])
    reader.wait(1, 5.0)
    busy_s = reader.busy_s
    time.sleep(0.02)
    assert reader.busy_s == busy_s > 0


def test_short_reads_are_continued(pipe: tuple[int, int], memory: mmap.mmap) -> None:
    # A pipe gives what is there. Nothing is read twice at these offsets: each part is a whole number of pages.
    reader = make_reader([pipe[0]], piece_bytes=4 * PAGE)
    reader.submit([(1, 0, 0, 3 * PAGE, address_of(memory))])
    for i in range(3):
        assert reader.wait(1, 0.05) == []
        os.write(pipe[1], bytes([i + 1]) * PAGE)
    assert reader.wait(1, 5.0) == [(1, 0)]
    assert memory[: 4 * PAGE] == b"".join(bytes([i]) * PAGE for i in (1, 2, 3, 0))


def test_a_short_read_is_continued_from_a_page_on(pipe: tuple[int, int], memory: mmap.mmap) -> None:
    # As direct reads must begin there. What a file would give twice, a pipe gives once.
    reader = make_reader([pipe[0]], piece_bytes=4 * PAGE)
    reader.submit([(1, 0, 0, 2 * PAGE, address_of(memory))])
    os.write(pipe[1], b"a" * (PAGE + 100))
    assert reader.wait(1, 0.05) == []
    os.write(pipe[1], b"b" * PAGE)
    assert reader.wait(1, 5.0) == [(1, 0)]
    assert memory[: 2 * PAGE] == b"a" * PAGE + b"b" * PAGE


def test_depth_bounds_what_the_kernel_holds(pipe: tuple[int, int], memory: mmap.mmap) -> None:
    reader = make_reader([pipe[0]], depth=3)
    reader.submit([(i, 0, 0, PAGE, address_of(memory) + i * PAGE) for i in range(10)])
    assert reader.cancel(list(range(10))) == list(range(3, 10)), "three have begun"
    os.write(pipe[1], bytes(3 * PAGE))
    assert sorted(reader.wait(10, 5.0)) == [(0, 0), (1, 0), (2, 0)]


def test_a_read_in_part_begun_is_not_dropped(pipe: tuple[int, int], memory: mmap.mmap) -> None:
    reader = make_reader([pipe[0]], depth=1)
    reader.submit([(5, 0, 0, 3 * PAGE, address_of(memory)), (6, 0, 0, PAGE, address_of(memory) + 8 * PAGE)])
    assert reader.cancel([5, 6, 99]) == [6]
    os.write(pipe[1], bytes(3 * PAGE))
    assert reader.wait(1, 5.0) == [(5, 0)]


def test_close_waits_for_what_is_under_way_and_drops_the_rest(pipe: tuple[int, int], memory: mmap.mmap) -> None:
    reader = make_reader([pipe[0]], depth=2)
    reader.submit([(i, 0, 0, 2 * PAGE, address_of(memory) + 2 * i * PAGE) for i in range(6)])
    waited: list[tuple[int, int]] = []
    waiter = threading.Thread(target=lambda: waited.extend(reader.wait(100, 30.0)))
    waiter.start()
    closer = threading.Thread(target=reader.close)
    closer.start()
    closer.join(0.3)
    assert closer.is_alive(), "the kernel may still write"
    os.write(pipe[1], b"x" * 2 * PAGE)
    closer.join(10)
    waiter.join(10)
    assert not closer.is_alive()
    assert not waiter.is_alive()
    assert memory[: 2 * PAGE] == b"x" * 2 * PAGE
    assert memory[2 * PAGE :] == bytes(62 * PAGE)
    # Whether the waiter was there before the close is a matter of luck.
    assert waited == [] or dict(waited) == {0: 0} | dict.fromkeys(range(1, 6), errno.ECANCELED)
    for call in (lambda: reader.wait(0, 0.0), lambda: reader.submit([]), lambda: reader.cancel([])):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    reader.close()


def test_wait_gives_the_kernel_the_next_piece(pipe: tuple[int, int], memory: mmap.mmap) -> None:
    reader = make_reader([pipe[0]], depth=1)
    reader.submit([(i, 0, 0, PAGE, address_of(memory)) for i in range(2)])
    waited: list[tuple[int, int]] = []
    waiter = threading.Thread(target=lambda: waited.extend(reader.wait(2, 30.0)))
    waiter.start()
    time.sleep(0.1)
    os.write(pipe[1], bytes(PAGE))
    time.sleep(0.1)
    os.write(pipe[1], bytes(PAGE))
    waiter.join(10)
    assert waited == [(0, 0), (1, 0)]


def test_submits_while_another_thread_waits(pipe: tuple[int, int], descriptor: int, memory: mmap.mmap) -> None:
    reader = make_reader([pipe[0], descriptor])
    reader.submit([(0, 0, 0, PAGE, address_of(memory))])
    waited: list[tuple[int, int]] = []
    waiter = threading.Thread(target=lambda: waited.extend(reader.wait(2, 30.0)))
    waiter.start()
    time.sleep(0.05)
    reader.submit([(1, 1, 0, PAGE, address_of(memory) + PAGE)])
    os.write(pipe[1], bytes(PAGE))
    waiter.join(10)
    assert sorted(waited) == [(0, 0), (1, 0)]


def test_reads_outlive_the_thread_that_submitted_them(pipe: tuple[int, int], memory: mmap.mmap) -> None:
    # The kernel cancels what a thread that ends had submitted; we submit it again.
    reader = make_reader([pipe[0]])
    thread = threading.Thread(target=lambda: reader.submit([(3, 0, 0, PAGE, address_of(memory))]))
    thread.start()
    thread.join()
    assert reader.wait(1, 0.3) == []
    os.write(pipe[1], b"y" * PAGE)
    assert reader.wait(1, 5.0) == [(3, 0)]
    assert memory[:PAGE] == b"y" * PAGE


def test_memory_is_not_registered_under_reads(pipe: tuple[int, int], memory: mmap.mmap) -> None:
    reader = make_reader([pipe[0]])
    reader.submit([(0, 0, 0, PAGE, address_of(memory))])
    with pytest.raises(RuntimeError, match="under way"):
        reader.register_buffers([(address_of(memory), len(memory))])
    os.write(pipe[1], bytes(PAGE))
    reader.wait(1, 5.0)


@pytest.mark.parametrize("registered", [False, True])
def test_reads_at_the_edges_of_registered_memory(descriptor: int, memory: mmap.mmap, registered: bool) -> None:
    reader = make_reader([descriptor], piece_bytes=2 * PAGE)
    address = address_of(memory)
    if registered:
        assert reader.register_buffers([(address + 32 * PAGE, 8 * PAGE), (address + 8 * PAGE, 8 * PAGE)]) == 0
    # Before, across the begin, within, across the end, behind, of either buffer.
    reader.submit([(i, 0, i * PAGE, 2 * PAGE, address + i * PAGE) for i in range(0, 62, 3)])
    assert sorted(reader.wait(100, 5.0)) == [(i, 0) for i in range(0, 62, 3)]
    for i in range(0, 62, 3):
        assert memory[i * PAGE : (i + 2) * PAGE] == os.pread(descriptor, 2 * PAGE, i * PAGE)


def test_memory_can_be_registered_anew(descriptor: int, memory: mmap.mmap) -> None:
    reader = make_reader([descriptor])
    for first_page in (0, 16, 8):
        address = address_of(memory) + first_page * PAGE
        assert reader.register_buffers([(address, 8 * PAGE)]) == 0
        reader.submit([(0, 0, 0, 8 * PAGE, address)])
        assert reader.wait(1, 5.0) == [(0, 0)]
        assert memory[first_page * PAGE :][: 8 * PAGE] == os.pread(descriptor, 8 * PAGE, 0)
    assert reader.register_buffers([]) == 0


@pytest.mark.parametrize("method", ["io_uring", "threads"])
def test_bad_descriptors_and_addresses_are_errors_of_their_reads(
    descriptor: int, memory: mmap.mmap, method: str
) -> None:
    closed = os.dup(descriptor)
    reader = make_reader([descriptor, closed], method=method)
    os.close(closed)
    reader.submit(
        [
            (0, 0, 0, 9 * PAGE, address_of(memory)),
            (1, 1, 0, 9 * PAGE, address_of(memory) + 16 * PAGE),
            (2, 0, 0, 9 * PAGE, 4096),
            (3, 0, 60 * PAGE, 9 * PAGE, address_of(memory) + 32 * PAGE),
        ]
    )
    expected = {0: 0, 1: errno.EBADF, 2: errno.EFAULT, 3: _cpu.END_OF_FILE}
    assert dict(reader.wait(4, 5.0)) == expected
    assert memory[: 9 * PAGE] == os.pread(descriptor, 9 * PAGE, 0)
    assert reader.num_reads == 1


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ((0, 1, 0, PAGE, 4096), "no such file"),
        ((0, 0, 0, 0, 4096), "from 1 to"),
        ((0, 0, 0, (1 << 62) + 1, 4096), "from 1 to"),
        ((0, 0, (1 << 62) + 1, 1, 4096), "from 1 to"),
        ((0, 0, 0, PAGE, 0), "no memory"),
    ],
)
def test_reads_that_make_no_sense_are_refused(
    descriptor: int, read: tuple[int, int, int, int, int], message: str
) -> None:
    reader = make_reader([descriptor], method="threads")
    with pytest.raises(ValueError, match=message):
        reader.submit([read])
    assert reader.in_flight == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 8, "threads", PAGE), "no file"),
        (([0], 0, "threads", PAGE), "queue_depth"),
        (([0], 1025, "threads", PAGE), "queue_depth"),
        (([0], 8, "pigeons", PAGE), "method"),
        (([0], 8, "threads", 5000), "piece_bytes"),
        (([0], 8, "threads", 0), "piece_bytes"),
    ],
)
def test_readers_that_make_no_sense_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _cpu.DiskReader(*arguments)


def test_threads_register_nothing(descriptor: int, memory: mmap.mmap) -> None:
    reader = make_reader([descriptor], method="threads")
    assert reader.register_buffers([(address_of(memory), PAGE)]) == errno.ENOTSUP
