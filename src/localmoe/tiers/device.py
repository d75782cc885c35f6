"""Device memory for experts: one slab, cut into equal slots, and a stream of its own that fills and empties them.

Copies run in the order in which they are asked for, beside what the device computes. A copy begins when everything
that was launched on the compute stream (torch's current one) before it has ended, so a slot may be filled anew as
soon as the last use of it is launched; what is launched after `wait` begins when the copy has ended. On a CPU, where
tests run, copies have ended when the call returns.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.core.errors import DeviceError, EngineStartError

TensorScales = tuple[float, float, float]
Mark = torch.cuda.Event | float
"""A moment on the device's compute stream."""


@dataclass(frozen=True, eq=False)
class Copy:
    """A ticket: one expert on its way."""

    started: Mark
    ended: Mark


class DeviceArena:
    """Slots of `slot_bytes` bytes; whoever plans says what is in which.

    Args:
        slot_bytes: a multiple of 64.
        device: where; a CPU in tests.

    Raises:
        EngineStartError: that much memory is not to be had.
    """

    def __init__(self, slot_bytes: int, num_slots: int, device: torch.device) -> None:
        assert num_slots > 0
        assert slot_bytes % 64 == 0
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._is_cuda = device.type == "cuda"
        try:
            self.blobs = torch.empty(num_slots, slot_bytes, dtype=torch.uint8, device=device)
            """uint8 [num_slots, slot_bytes]"""
            self.tensor_scales = torch.ones(num_slots, 3, device=device)
            """float32 [num_slots, 3], of gate, up and down"""
            self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        except (RuntimeError, MemoryError) as error:  # torch's errors of the device are RuntimeErrors
            raise EngineStartError(
                f"not enough device memory: {num_slots} slots of {slot_bytes} bytes for experts cannot be had: "
                f"{error}; lower the device's budget"
            ) from error

    def copy_in(self, slot: int, blob: Tensor, tensor_scales: TensorScales | None) -> Copy:
        """Begin to fill a slot.

        Args:
            blob: uint8 [slot_bytes] in host memory, asynchronous if it is pinned; stays as it is until `done`.
            tensor_scales: of gate, up and down; None where the format has none.

        Raises:
            DeviceError: the device refuses.
        """
        with _named("a copy of an expert to the device failed"), self._copying() as started:
            self.blobs[slot].copy_(blob, non_blocking=True)
            for index, scale in enumerate(tensor_scales or ()):
                self.tensor_scales[slot, index].fill_(scale)
            return Copy(started, self.mark())

    def copy_out(self, slot: int, blob: Tensor) -> Copy:
        """Begin to empty a slot into host memory, which is not to be touched until `done`.

        Raises:
            DeviceError: the device refuses.
        """
        with _named("a copy of an expert from the device failed"), self._copying() as started:
            blob.copy_(self.blobs[slot], non_blocking=True)
            return Copy(started, self.mark())

    def wait(self, copy: Copy) -> None:
        """What is launched from here on begins when the copy has ended; the host does not wait."""
        if isinstance(copy.ended, torch.cuda.Event):
            torch.cuda.current_stream(self.blobs.device).wait_event(copy.ended)

    def done(self, copy: Copy) -> bool:
        """Whether it has ended. Raises DeviceError if the device has failed."""
        with _named("the device failed"):
            return not isinstance(copy.ended, torch.cuda.Event) or bool(copy.ended.query())  # type: ignore[no-untyped-call]

    def finish(self, copy: Copy) -> None:
        """Let the host wait for it. Raises DeviceError if the device has failed."""
        if isinstance(copy.ended, torch.cuda.Event):
            with _named("the device failed"):
                copy.ended.synchronize()

    def copy_s(self, copy: Copy) -> float:
        """How long a copy took that is done."""
        return self.seconds_between(copy.started, copy.ended)

    def mark(self) -> Mark:
        """The moment at which the current stream gets here."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds_between(self, start: Mark, end: Mark) -> float:
        """Both must have been reached."""
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float)
            assert isinstance(end, float)
            return end - start
        return 1e-3 * float(start.elapsed_time(end))

    @contextmanager
    def _copying(self) -> Iterator[Mark]:
        """Within, what is launched belongs to the copy stream; gives the moment at which it begins."""
        if self._stream is None:
            yield self.mark()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.blobs.device))
        with torch.cuda.stream(self._stream):
            yield self.mark()


class HostMirror:
    """Host memory that the device copies to and from, locked where it is a GPU's; one buffer for each name, reused.

    Args:
        device: the other side.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer of this shape, with anything in it; the one of the same name before it is gone."""
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = torch.empty(size, dtype=dtype, pin_memory=self._device.type == "cuda")
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor of the device here, on the current stream; to be read after `synchronize`."""
        mirrored = self.take(name, tensor.shape, tensor.dtype)
        return mirrored.copy_(tensor, non_blocking=True)

    def synchronize(self) -> None:
        """Let the host wait for the current stream. Raises DeviceError if the device has failed."""
        if self._device.type == "cuda":
            with _named("the device failed"):
                torch.cuda.current_stream(self._device).synchronize()


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(f"{what}: {error}") from error
