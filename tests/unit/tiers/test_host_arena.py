"""Host memory in slots."""

import re
from collections.abc import Iterator

import pytest
import torch

from localmoe.core.errors import EngineStartError
from localmoe.tiers.host import HostArena

PAGE = 4096
HUGE_PAGE = 2 << 20
PLENTY = 1 << 30


@pytest.fixture
def arena() -> Iterator[HostArena]:
    arena = HostArena(5000, 4, available_memory_bytes=PLENTY)
    yield arena
    arena.close()


@pytest.mark.parametrize(
    ("slot_bytes", "stride_bytes"),
    [
        (1, PAGE),
        (PAGE, PAGE),
        (5000, 2 * PAGE),
        (816 * PAGE, 816 * PAGE),
        (HUGE_PAGE, HUGE_PAGE),
        (HUGE_PAGE - 9 * PAGE, HUGE_PAGE),
        (HUGE_PAGE - 11 * PAGE, HUGE_PAGE - 11 * PAGE),
    ],
)
def test_slots_are_aligned_and_apart(slot_bytes: int, stride_bytes: int) -> None:
    arena = HostArena(slot_bytes, 3, available_memory_bytes=PLENTY)
    slots = [arena.slot(index) for index in range(3)]
    assert all(slot.dtype == torch.uint8 and slot.shape == (slot_bytes,) for slot in slots)
    assert [slot.data_ptr() - arena.memory.data_ptr() for slot in slots] == [i * stride_bytes for i in range(3)]
    assert arena.memory.data_ptr() % HUGE_PAGE == 0
    assert arena.memory.nbytes == 3 * stride_bytes
    for i, slot in enumerate(slots):
        slot.fill_(i + 1)
    assert [set(slot.tolist()) for slot in slots] == [{1}, {2}, {3}]


@pytest.mark.parametrize("index", [-1, 4])
def test_there_are_no_other_slots(arena: HostArena, index: int) -> None:
    with pytest.raises(AssertionError):
        arena.slot(index)


def test_all_memory_is_there_from_the_start() -> None:
    before_bytes = _resident_bytes()
    arena = HostArena(HUGE_PAGE, 32, available_memory_bytes=PLENTY)
    assert _resident_bytes() - before_bytes > 30 * HUGE_PAGE
    arena.close()
    assert _resident_bytes() - before_bytes < 2 * HUGE_PAGE


def test_shrinking_returns_the_last_slots() -> None:
    arena = HostArena(HUGE_PAGE, 32, available_memory_bytes=PLENTY)
    kept = [arena.slot(index).fill_(7) for index in range(8)]
    before_bytes = _resident_bytes()
    arena.shrink(32)
    assert _resident_bytes() == pytest.approx(before_bytes, abs=HUGE_PAGE)
    arena.shrink(8)
    assert arena.num_slots == 8
    assert before_bytes - _resident_bytes() > 22 * HUGE_PAGE
    assert all(bool((slot == 7).all()) for slot in kept)
    for num_slots in (0, 9):
        with pytest.raises(AssertionError):
            arena.shrink(num_slots)
    with pytest.raises(AssertionError):
        arena.slot(8)


def test_memory_that_is_not_there() -> None:
    with pytest.raises(EngineStartError, match=re.escape("10 slots of 8192 bytes for experts need 81920, 81919")):
        HostArena(5000, 10, available_memory_bytes=81919)
    with pytest.raises(EngineStartError, match="cannot be had"):
        HostArena(1 << 50, 8, available_memory_bytes=1 << 60)


def test_views_outlive_the_arena(arena: HostArena) -> None:
    slot = arena.slot(0).fill_(9)
    arena.close()
    assert bool((slot == 9).all())
    with pytest.raises(AssertionError, match="closed"):
        _ = arena.memory
    arena.close()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE
