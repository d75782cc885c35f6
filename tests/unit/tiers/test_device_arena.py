"""The device arena on a CPU: what is copied where, and failures by name."""

import pytest
import torch

from localmoe.core.errors import DeviceError
from localmoe.tiers.device import DeviceArena, HostMirror

CPU = torch.device("cpu")


def blob(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (128,), generator=torch.Generator().manual_seed(seed)).byte()


def test_what_goes_in_comes_out() -> None:
    arena = DeviceArena(128, 3, CPU)
    for slot in (2, 0):
        copy = arena.copy_in(slot, blob(slot), (0.5, 2.0, slot + 1.0) if slot else None)
        arena.wait(copy)
        arena.finish(copy)
        assert arena.done(copy)
        assert arena.copy_s(copy) >= 0
    assert torch.equal(arena.blobs[2], blob(2))
    assert arena.tensor_scales.tolist() == [[1.0] * 3, [1.0] * 3, [0.5, 2.0, 3.0]]
    out = torch.empty(128, dtype=torch.uint8)
    assert arena.done(arena.copy_out(0, out))
    assert torch.equal(out, blob(0))
    earlier, later = arena.mark(), arena.mark()
    assert arena.seconds_between(earlier, later) >= 0


def test_failures_have_names() -> None:
    arena = DeviceArena(128, 1, CPU)
    with pytest.raises(DeviceError, match="a copy of an expert to the device failed"):
        arena.copy_in(0, blob(0)[:100], None)
    with pytest.raises(DeviceError, match="a copy of an expert from the device failed"):
        arena.copy_out(0, torch.empty(100, dtype=torch.uint8))


def test_a_mirror_reuses_its_memory() -> None:
    mirror = HostMirror(CPU)
    large, small = torch.randn(5, 3), torch.randn(2, 4)
    first = mirror.copy("x", large)
    mirror.synchronize()
    assert torch.equal(first, large)
    second = mirror.copy("x", small)
    assert torch.equal(second, small)
    assert second.data_ptr() == first.data_ptr()
    assert mirror.take("ids", (2, 2), torch.int32).dtype == torch.int32
    assert mirror.take("x", (6, 3), torch.float32).shape == (6, 3)
