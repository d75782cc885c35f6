"""Decides which experts are on the device, beside those in RAM. Moves nothing itself.

An expert has a home on the device, or in RAM, or is on the disk only, so that both memories add up. Some slots are
nobody's home: landing slots. What the device computes without being its home passes through them and stays where it
was; what moves in lands in one, which becomes its home, while the home of whoever goes is the next landing slot. So
nothing is given up before what replaces it has arrived, and a prompt's many experts drive nobody out.

Who is worth more is the policy's to say, and only the order of its values counts. That is why the margin against
swapping two experts to and fro is one of order, too: to move in, an expert must be worth more than not only the
coldest one here, but the coldest few.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localmoe.core.model import ExpertId
from localmoe.residency.policy import RetentionPolicy

_MOST_LANDING_SLOTS = 8
_LANDING_SHARE = 1 / 4
"""Of the slots, at most."""
_MARGIN = 0.05
"""An expert moves in if it is worth more than the coldest here and this share of all of them."""


class DeviceResidency:
    """Homes of a model's experts in the slots of a device.

    Args:
        num_slots: at least 1.
        policy: of all uses, wherever they are computed.
    """

    def __init__(self, *, num_layers: int, num_experts: int, num_slots: int, policy: RetentionPolicy) -> None:
        assert num_slots >= 1
        self.num_slots = num_slots
        self.num_landing = max(1, min(_MOST_LANDING_SLOTS, int(num_slots * _LANDING_SHARE)))
        """Slots that are always nobody's home."""
        self.num_evictions = 0
        self._policy = policy
        self._slots_LE = np.full((num_layers, num_experts), -1, np.int32)
        self._free_slots = list(reversed(range(num_slots)))
        self._num_home = 0

    @property
    def num_home(self) -> int:
        """Experts whose home is here."""
        return self._num_home

    @property
    def is_full(self) -> bool:
        """Whether somebody must go before another moves in."""
        return self.num_vacant == 0

    def slots(self, layer: int) -> NDArray[np.int32]:
        """The home of each of a layer's experts, -1 where it has none here. A view."""
        slots_E: NDArray[np.int32] = self._slots_LE[layer]
        return slots_E

    def present(self) -> NDArray[np.bool_]:
        """Whether each expert [layers, experts] has its home here."""
        present: NDArray[np.bool_] = self._slots_LE >= 0
        return present

    @property
    def num_free(self) -> int:
        """Landing slots, and others that are nobody's home yet, that are not taken."""
        return len(self._free_slots)

    @property
    def num_vacant(self) -> int:
        """Experts that may move in before somebody must go."""
        return max(0, self.num_slots - self.num_landing - self._num_home)

    def has(self, expert: ExpertId) -> bool:
        """Whether its home is here."""
        return bool(self._slots_LE[expert.layer, expert.expert] >= 0)

    def take_landing(self) -> int:
        """A free slot, until `free` or `move_in`."""
        return self._free_slots.pop()

    def free(self, slot: int) -> None:
        """A landing slot is no longer needed."""
        self._free_slots.append(slot)

    def is_wanted(self, expert: ExpertId) -> bool:
        """Whether it is worth a home here."""
        if not self.is_full:
            return True
        bar = self._bar()
        return bar is not None and bool(self._policy.values()[expert.layer, expert.expert] > bar)

    def wanted(self, in_ram_LE: NDArray[np.bool_]) -> list[ExpertId]:
        """Those of RAM that are worth a home here, the one worth most first."""
        values = self._policy.values()
        candidates = np.flatnonzero(in_ram_LE & (self._slots_LE < 0))
        best = candidates[np.argsort(-values.ravel()[candidates], kind="stable")]
        if self.is_full:
            bar = self._bar()
            if bar is None:
                return []
            best = best[values.ravel()[best] > bar]
        else:
            best = best[: self.num_vacant]
        return [ExpertId(*divmod(int(index), self._slots_LE.shape[1])) for index in best]

    def move_in(self, expert: ExpertId, slot: int) -> ExpertId | None:
        """A landing slot becomes an expert's home. Returns who must go: `move_out` is to follow."""
        assert self._slots_LE[expert.layer, expert.expert] < 0, "it has a home"
        victim = self._coldest() if self.is_full else None
        self._slots_LE[expert.layer, expert.expert] = slot
        self._num_home += 1
        return victim

    def move_out(self, expert: ExpertId) -> int:
        """An expert has no home here any more. Returns its slot, which becomes free: for copies that follow."""
        slot = int(self._slots_LE[expert.layer, expert.expert])
        assert slot >= 0, "it has no home"
        self._slots_LE[expert.layer, expert.expert] = -1
        self._num_home -= 1
        self.num_evictions += 1
        self.free(slot)
        return slot

    def _coldest(self) -> ExpertId | None:
        home = np.flatnonzero(self._slots_LE >= 0)
        if not len(home):
            return None
        coldest = int(home[np.argmin(self._policy.values().ravel()[home])])
        return ExpertId(*divmod(coldest, self._slots_LE.shape[1]))

    def _bar(self) -> float | None:
        """What is to be exceeded to move in; None where nobody can."""
        values = self._policy.values()[self._slots_LE >= 0]
        if not len(values):
            return None
        rank = int(_MARGIN * len(values))
        return float(np.partition(values, rank)[rank])


class ToldElsewhere:
    """A policy that others tell what is used, for who only asks for values."""

    def __init__(self, policy: RetentionPolicy) -> None:
        self._policy = policy

    def observe(self, layer: int, experts: ArrayLike, *, prefill: bool) -> None:
        pass  # has been told

    def values(self) -> NDArray[np.float64]:
        return self._policy.values()
