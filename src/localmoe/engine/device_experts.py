"""Experts on the device: who moves there and back, and how those that are only fetched pass through.

An expert moves in when its copy has ended, and is in RAM until then, so that a copy under way never holds anything
up. Whoever leaves the device is copied into RAM if there is room or somebody there is worth less, else dropped.
Experts that are fetched to be computed once are lent by RAM; they land in slots that are nobody's home, and nothing
changes but the time.

A failure leaves everybody at home where they were: slots and loans are given back, or given up when the copies under
way have ended.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.events import TierState
from localmoe.core.model import ExpertId
from localmoe.core.protocols import Routed
from localmoe.residency.device import DeviceResidency
from localmoe.tiers.device import Copy, DeviceArena, TensorScales

_MOST_AT_ONCE = 4
"""Fetched experts that are computed in one launch, while as many land."""
_SMOOTHING = 0.1
"""Weight of the newest in running means."""


class HostExperts(Protocol):
    """An executor on the CPU that shares experts with a device. Calls come between its layers."""

    @property
    def prefetch_layers(self) -> int:
        """Of how many following layers it asks the routers."""
        ...

    @property
    def stall_s(self) -> float:
        """Total time in which there was nothing to do but wait for experts."""
        ...

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None: ...

    def fill(self, elsewhere_LE: NDArray[np.bool_]) -> None:
        """Read experts into free slots, the same number of every layer, but not those that are elsewhere."""
        ...

    def state(self) -> TierState: ...

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None: ...

    def present(self) -> NDArray[np.bool_]:
        """Whether each expert [layers, experts] is in RAM now."""
        ...

    def lend(self, expert: ExpertId, *, is_used: bool) -> Tensor | None:
        """The blob of one in RAM, uint8, which stays as it is until `return_loan` or `give_up`; None: not now.

        Args:
            is_used: the layer at hand uses it.
        """
        ...

    def return_loan(self, expert: ExpertId) -> None:
        """It has been copied, and stays here."""
        ...

    def give_up(self, expert: ExpertId) -> None:
        """It has been copied, and lives on the device from now on; or what there was room for does not come."""
        ...

    def room_for(self, expert: ExpertId) -> Tensor | None:
        """Memory for one that leaves the device, until `received` or `give_up`; None: it is to be dropped."""
        ...

    def received(self, expert: ExpertId) -> None:
        """It is where there was room for it."""
        ...


class SlotExperts(Protocol):
    """A layer's experts on the device; see `kernels.triton.experts`."""

    def place(self, expert: int, slot: int) -> None: ...

    def remove(self, expert: int) -> None: ...

    def begin(self, h_TD: Tensor, ids_TK: Tensor) -> None: ...

    def compute(self, experts: Sequence[int] | None = None) -> None: ...

    def finish(self, weights_TK: Tensor, x_TD: Tensor) -> None: ...


@dataclass(kw_only=True)
class Moves:
    """Totals of what passed over the link."""

    copies_in: int = 0
    copies_out: int = 0
    busy_s: float = 0.0
    copy_s: float = 0.0
    """Running mean of one copy's time; 0: not known yet."""


@dataclass(frozen=True, kw_only=True)
class _Landed:
    """A fetched expert in a slot that is nobody's home, or on the way there."""

    expert: int
    slot: int
    copy: Copy


class DeviceExperts:
    """A model's experts on one device.

    Args:
        layers: share the arena's slots.
        host: has the experts that are not here.
        residency: of the arena's slots.
        tensor_scales: of each expert; None where the format has none.
    """

    def __init__(
        self,
        *,
        arena: DeviceArena,
        layers: Sequence[SlotExperts],
        host: HostExperts,
        residency: DeviceResidency,
        tensor_scales: Callable[[ExpertId], TensorScales | None],
    ) -> None:
        self.arena = arena
        self.layers = layers
        self.residency = residency
        self.moves = Moves()
        self._host = host
        self._tensor_scales = tensor_scales
        self._loans: deque[tuple[Copy, ExpertId]] = deque()
        """Of experts that are fetched, in the order in which their copies end."""
        self._arriving: dict[ExpertId, tuple[Copy, int]] = {}
        """Experts that are to stay, and the slots they land in."""
        self._leaving: dict[ExpertId, Copy] = {}
        """Experts on their way into RAM."""

    def fill(self) -> None:
        """Read experts into RAM, and let them move in, the same number of every layer, until both are full.

        Raises:
            StoreError: one is damaged or cannot be read.
            DeviceError: the device has failed.
        """
        num_home = -1
        while num_home < self.residency.num_home:
            num_home = self.residency.num_home
            self._host.fill(self.residency.present())
            for expert, layer in np.argwhere(self._host.present().T).tolist():
                if len(self._arriving) >= self.residency.num_vacant:
                    break
                self.bring(ExpertId(layer, expert))
            self.drain()

    @property
    def can_bring(self) -> bool:
        """Whether there is a slot to land in, some being kept for what is fetched."""
        return self.residency.num_free > self.residency.num_landing // 2

    def wanted(self) -> list[ExpertId]:
        """Those of RAM that are worth a home here and not on the way, the one worth most first."""
        in_ram_LE = self._host.present().copy()
        for arriving in self._arriving:
            in_ram_LE[arriving.layer, arriving.expert] = False
        return self.residency.wanted(in_ram_LE)

    def bring(self, expert: ExpertId) -> bool:
        """Begin to copy an expert that is to stay, if it is in RAM only. Returns whether a copy has begun.

        Raises:
            DeviceError: the device refuses.
        """
        if expert in self._arriving or self.residency.has(expert) or not self.can_bring:
            return False
        blob = self._host.lend(expert, is_used=False)
        if blob is None:
            return False
        slot = self.residency.take_landing()
        try:
            self._arriving[expert] = self._copy_in(expert, blob, slot), slot
        except BaseException:
            self.residency.free(slot)
            self._host.return_loan(expert)
            raise
        return True

    def settle(self, layer: int = -1, used: Sequence[int] = ()) -> None:
        """Take into account what has been copied, and wait for what is used of this layer and on its way into RAM.

        Raises:
            DeviceError: the device has failed.
        """
        while self._loans and self.arena.done(self._loans[0][0]):
            copy, expert = self._loans.popleft()
            self._count(copy)
            self._host.return_loan(expert)
        for arrived, (copy, slot) in list(self._arriving.items()):
            if self.arena.done(copy):
                self._count(copy)
                del self._arriving[arrived]
                self._move_in(arrived, slot)
        for left, copy in list(self._leaving.items()):
            if left.layer == layer and left.expert in used:
                self.arena.finish(copy)
            if self.arena.done(copy):
                self._count(copy)
                del self._leaving[left]
                self._host.received(left)

    def drain(self) -> None:
        """Wait until nothing moves any more. Raises DeviceError."""
        while copies := [
            *(copy for copy, _ in self._loans),
            *(copy for copy, _ in self._arriving.values()),
            *self._leaving.values(),
        ]:
            for copy in copies:
                self.arena.finish(copy)
            self.settle()

    def borrow(self, layer: int, experts: Sequence[int]) -> list[tuple[int, Tensor]]:
        """The blobs of those of a layer's experts that RAM lends; for `compute`."""
        if not self.residency.num_free:
            return []
        blobs = []
        for expert in experts:
            expert_id = ExpertId(layer, expert)
            blob = None if expert_id in self._arriving else self._host.lend(expert_id, is_used=True)
            if blob is not None:
                blobs.append((expert, blob))
        return blobs

    def compute(self, layer: int, *, home: bool, fetched: Sequence[tuple[int, Tensor]]) -> list[Copy]:
        """Launch the copies of what is fetched and all products; the host waits for nothing.

        Args:
            home: whether any is used whose home is here.
            fetched: of `borrow`.

        Returns:
            The copies.

        Raises:
            DeviceError: the device refuses.
        """
        experts, num_free = self.layers[layer], self.residency.num_free
        size = max(1, min(_MOST_AT_ONCE, num_free // 2))
        waiting = deque(fetched)
        landed: deque[list[_Landed]] = deque()
        copies: list[Copy] = []

        def land() -> None:
            landed.append([])
            while waiting and len(landed[-1]) < size:
                landed[-1].append(self._land(layer, *waiting[0]))
                waiting.popleft()
                copies.append(landed[-1][-1].copy)

        try:
            # Copies begin when what was launched before them has ended, so the first two groups come before all.
            for _ in range(min(2, num_free // size)):
                land()
            if home:
                experts.compute()
            while landed:
                self._compute_landed(experts, landed[0])
                self._free(landed.popleft())
                if waiting:
                    land()
        except BaseException:
            for group in landed:
                self._free(group)
            for expert, _ in waiting:
                self._host.return_loan(ExpertId(layer, expert))
            raise
        return copies

    def _land(self, layer: int, expert: int, blob: Tensor) -> _Landed:
        slot = self.residency.take_landing()
        try:
            copy = self._copy_in(ExpertId(layer, expert), blob, slot)
        except BaseException:
            self.residency.free(slot)
            raise
        self._loans.append((copy, ExpertId(layer, expert)))
        return _Landed(expert=expert, slot=slot, copy=copy)

    def _compute_landed(self, experts: SlotExperts, group: Sequence[_Landed]) -> None:
        if not group:
            return
        try:
            for landed in group:
                self.arena.wait(landed.copy)
                experts.place(landed.expert, landed.slot)
            experts.compute([landed.expert for landed in group])
        finally:
            for landed in group:
                experts.remove(landed.expert)

    def _free(self, group: Sequence[_Landed]) -> None:
        for landed in group:
            self.residency.free(landed.slot)

    def _copy_in(self, expert: ExpertId, blob: Tensor, slot: int) -> Copy:
        copy = self.arena.copy_in(slot, blob, self._tensor_scales(expert))
        self.moves.copies_in += 1
        return copy

    def _move_in(self, expert: ExpertId, slot: int) -> None:
        """An expert has arrived; somebody may have to leave for it."""
        residency = self.residency
        if not residency.is_wanted(expert):  # any more
            residency.free(slot)
            self._host.return_loan(expert)
            return
        victim = residency.move_in(expert, slot)
        self.layers[expert.layer].place(expert.expert, slot)
        self._host.give_up(expert)
        if victim is None:
            return
        self.layers[victim.layer].remove(victim.expert)
        slot = residency.move_out(victim)
        room = self._host.room_for(victim)
        if room is None:
            return
        try:
            self._leaving[victim] = self.arena.copy_out(slot, room)
        except BaseException:
            self._host.give_up(victim)
            raise
        self.moves.copies_out += 1

    def _count(self, copy: Copy) -> None:
        moves, copy_s = self.moves, self.arena.copy_s(copy)
        moves.busy_s += copy_s
        moves.copy_s += (copy_s - moves.copy_s) * (_SMOOTHING if moves.copy_s else 1.0)
