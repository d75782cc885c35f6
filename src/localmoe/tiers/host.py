"""Host memory for experts: one anonymous mapping, cut into equal slots."""

import ctypes
import errno
import mmap
import os

import torch

from localmoe.core.errors import EngineStartError

_HUGE_PAGE_BYTES = 2 << 20
_HUGE_PAGE_WASTE = 0.02
_ALIGNMENT_BYTES = 4096
_MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later; not named by Python's mmap."""


class HostArena:
    """Slots of `slot_bytes` bytes, aligned for direct reads; whoever plans says what is in which.

    All of it is in memory when it is made, so that a budget that does not fit is found at once.
    """

    def __init__(
        self, slot_bytes: int, num_slots: int, *, available_memory_bytes: int, pinned: bool = False
    ) -> None:
        """Take the memory.

        Args:
            available_memory_bytes: what this process may still take.
            pinned: lock it for copies to and from a GPU.

        Raises:
            EngineStartError: that much memory is not to be had.
        """
        assert min(slot_bytes, num_slots) > 0, "an arena has slots, and slots have bytes"
        self.slot_bytes = slot_bytes
        self.stride_bytes = stride_bytes(slot_bytes)
        """From one slot to the next."""
        num_bytes = self.stride_bytes * num_slots
        if num_bytes > available_memory_bytes:
            raise EngineStartError(
                f"not enough memory: {num_slots} slots of {self.stride_bytes} bytes for experts need {num_bytes}, "
                f"{available_memory_bytes} are available; lower the memory budget"
            )
        mapped = _map(num_bytes)
        self._memory: torch.Tensor | None = mapped
        self._pinned = False
        self.num_slots = num_slots
        if pinned:
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            _check_cuda(cudart.cudaHostRegister(mapped.data_ptr(), num_bytes, 0))
            self._pinned = True

    def close(self) -> None:
        """Give up the memory; it goes back to the system with the last view of it."""
        if self._pinned:
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            _check_cuda(cudart.cudaHostUnregister(self.memory.data_ptr()))
            self._pinned = False
        self._memory = None

    @property
    def memory(self) -> torch.Tensor:
        """All of it, uint8."""
        assert self._memory is not None, "the arena is closed"
        return self._memory

    def slot(self, index: int) -> torch.Tensor:
        """A slot's memory, uint8 [slot_bytes]; what was in it before is still there."""
        assert 0 <= index < self.num_slots, "there is no such slot"
        return self.memory[index * self.stride_bytes :][: self.slot_bytes]

    def shrink(self, num_slots: int) -> None:
        """Return the slots from this one on to the system, for good; whoever used them must have stopped.

        Memory registered with a disk reader is not let go of before `DiskReader.register` is called again.
        """
        assert not self._pinned, "memory that a GPU knows cannot be returned in part"
        assert 0 < num_slots <= self.num_slots
        returned = self.memory[num_slots * self.stride_bytes : self.num_slots * self.stride_bytes]
        self.num_slots = num_slots
        if returned.nbytes:
            _advise(returned, mmap.MADV_DONTNEED)


def stride_bytes(slot_bytes: int) -> int:
    """Distance of slots: whole huge pages, if they waste little."""
    huge = _round_up(slot_bytes, _HUGE_PAGE_BYTES)
    if huge - slot_bytes < _HUGE_PAGE_WASTE * slot_bytes:
        return huge
    return _round_up(slot_bytes, _ALIGNMENT_BYTES)


def _round_up(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple


def _map(num_bytes: int) -> torch.Tensor:
    """Anonymous memory, present and aligned to huge pages. Raises EngineStartError."""
    try:
        # The tensor owns the mapping, which is never closed by hand.
        mapping = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages
                raise
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        memory = whole[-whole.data_ptr() % _HUGE_PAGE_BYTES :][:num_bytes]
        try:
            _advise(memory, _MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel that does not know this; pages come as they are touched
                raise
    except (OSError, OverflowError) as error:
        raise EngineStartError(
            f"not enough memory: {num_bytes} bytes for experts cannot be had: {error}; lower the memory budget"
        ) from error
    return memory


def _advise(memory: torch.Tensor, advice: int) -> None:
    """madvise for whole pages. Through ctypes, as mmap.madvise holds Python's global lock."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if madvise(memory.data_ptr(), memory.nbytes, advice):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _check_cuda(status: object) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise EngineStartError(f"pinning memory for the GPU failed: CUDA error {status}")
