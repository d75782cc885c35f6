"""Decides which experts are in memory: what to read next, and what to give up for it. Moves nothing itself.

An expert is absent, being read, or present in one slot of the arena. The caller goes through the layers of a step:

    fill       before the first step; says what to read into free slots
    need       these experts are used now; says which of them can be computed at once
    expect     those of a following layer, as far as its router can tell ahead
    take_unwanted, plan    what to read no more, and what to read now into which slots
    arrived, dropped    how a read ended
    learn      once reads are under way, and before anything is released
    release    these have been computed
    lend, return_loan, give_up, take_room, received    what passes between here and a device's memory

What is used now is pinned until it is released, what is expected until its layer has been. All other present experts
may be evicted, the one of the lowest value first, and only when a slot is needed: so an expert that is not worth
keeping is read, used, and next to go, which is all that admission has to do. That holds for a prompt, too: since only
so many reads are under way at once, its experts run through so many slots while the rest stays.

Experts with a quota that is used up take slots of each other: the least valued that is not pinned goes, though a slot
be free. Only when all that they hold is pinned do they take more, and what is beyond the quota later goes first.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from localmoe.core.model import ExpertId
from localmoe.core.plans import Load
from localmoe.residency.placement import Quota
from localmoe.residency.policy import RetentionPolicy

_ABSENT, _READING, _PRESENT, _RECEIVING = 0, 1, 2, 3
_FREE, _EXPECTED, _USED = 0, 1, 2


@dataclass(kw_only=True)
class ResidencyCounters:
    """Running totals since start; each counts experts."""

    hits: int = 0
    """Used, and kept from an earlier use."""
    misses: int = 0
    """Used, and read for this use, ahead or on demand."""
    evictions: int = 0
    prefetches: int = 0
    """Read ahead."""
    prefetches_useful: int = 0
    """Of them, used by the layer they were read for, and present by then."""
    prefetches_late: int = 0
    """Used, but still being read when the layer asked."""
    prefetches_wasted: int = 0
    """Not used by the layer they were read for, or given up."""


class ResidencyManager:
    """Placement of a model's experts in the slots of one arena.

    Args:
        num_slots: at least 1.
        most_reads: that may be under way at once, at least 1; as many as the disk needs to be busy.
        policy: says what keeping an expert is worth.
        quotas: of disjoint groups of experts.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        most_reads: int,
        policy: RetentionPolicy,
        quotas: Sequence[Quota] = (),
    ) -> None:
        assert min(num_slots, most_reads) >= 1
        self._most_reads = most_reads
        self._num_reading = 0
        self._num_experts = num_experts
        self._policy = policy
        # All arrays are flat, [layers * experts].
        size = num_layers * num_experts
        self._quotas = [(quota.experts_LE.ravel(), quota.percent) for quota in quotas]
        self._state = np.zeros(size, np.int8)
        self._pins = np.zeros(size, np.int8)
        self._slots = np.full(size, -1, np.int32)
        self._arrivals = np.zeros(size, np.int64)
        """The number of the arrival that brought each expert; the latest has the highest."""
        self._num_arrivals = 0
        self._lent = np.zeros(size, np.bool_)
        self._num_lent = 0
        """Slots that may not be emptied, since a device reads from them or writes into them."""
        self._free_slots = list(reversed(range(num_slots)))
        self._num_slots = num_slots
        self._wanted: deque[int] = deque()
        """Absent experts that the layer at hand uses, the most used first."""
        self._expected: deque[int] = deque()
        """Absent experts that the following layers are expected to use, nearer layers and likelier experts first."""
        self._ahead: set[int] = set()
        """Read, or being read, for layers that have not come yet."""
        self._unwanted: list[int] = []
        self._unlearned: tuple[int, NDArray[np.integer], NDArray[np.integer]] | None = None
        """What the policy has not been told yet: a layer, and what its prompts' and its decoded tokens use."""
        self.counters = ResidencyCounters()

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def num_present(self) -> int:
        return int(np.count_nonzero(self._state == _PRESENT))

    def present(self) -> NDArray[np.bool_]:
        """Whether each expert [layers, experts] is in memory now."""
        present: NDArray[np.bool_] = self._state == _PRESENT
        return present.reshape(-1, self._num_experts)

    def need(
        self, layer: int, prompt_TK: NDArray[np.integer], decoded_TK: NDArray[np.integer]
    ) -> tuple[list[int], list[int]]:
        """A layer uses experts now: those [tokens, experts each] of prompts' tokens, and those of tokens decoded.

        Returns:
            Experts that are present, and those that must be waited for.
        """
        self.learn()
        self._unlearned = (layer, prompt_TK, decoded_TK)
        used = distinct(decoded_TK)
        experts = [*used, *(expert for expert in distinct(prompt_TK) if expert not in used)]
        first = layer * self._num_experts
        num_useful = self._end_expectation(first, experts)
        present, awaited = [], []
        for expert in experts:
            index = first + expert
            self._pins[index] = _USED
            if self._state[index] == _PRESENT:
                present.append(expert)
                continue
            awaited.append(expert)
            if self._state[index] == _ABSENT:
                self._wanted.append(index)
        self.counters.hits += len(present) - num_useful
        self.counters.misses += len(awaited) + num_useful
        return present, awaited

    def learn(self) -> None:
        """Tell the policy what the layer at hand uses. Later than `need`, so that reads need not wait for it: what is
        used is pinned until it is released, whatever its value."""
        if self._unlearned is None:
            return
        (layer, prompt_TK, decoded_TK), self._unlearned = self._unlearned, None
        if len(prompt_TK):
            self._policy.observe(layer, prompt_TK, prefill=True)
        if len(decoded_TK):
            self._policy.observe(layer, decoded_TK, prefill=False)

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A layer after the one at hand will probably use these, the likeliest first. Nearer layers come first."""
        first = layer * self._num_experts
        for expert in experts:
            index = first + expert
            self._pins[index] = _EXPECTED
            if self._state[index] == _ABSENT:
                self._expected.append(index)

    def is_whole(self, layer: int) -> bool:
        """Whether no expert of a layer is absent, so that nothing need be expected of it."""
        first = layer * self._num_experts
        return not (self._state[first : first + self._num_experts] == _ABSENT).any()

    def take_unwanted(self) -> list[ExpertId]:
        """Reads ahead that have proved wrong since the last call: to be dropped if they have not begun."""
        unwanted, self._unwanted = self._unwanted, []
        # Whatever was wanted again meanwhile is pinned.
        return [self._expert(index) for index in unwanted if self._pins[index] == _FREE]

    def plan(self, most_prefetches: int) -> list[Load]:
        """What to read now, in order.

        Args:
            most_prefetches: reads ahead that may be under way at once.
        """
        loads = self._take_slots(self._wanted, len(self._wanted), highest_pin=_EXPECTED, is_prefetch=False)
        if not self._wanted and self._expected:
            most = most_prefetches - sum(self._state[index] == _READING for index in self._ahead)
            loads += self._take_slots(self._expected, most, highest_pin=_FREE, is_prefetch=True)
        return loads

    def fill(self, elsewhere_LE: NDArray[np.bool_]) -> list[Load]:
        """What to read into free slots before anything is used, the same number of every layer.

        Args:
            elsewhere_LE: whether each expert [layers, experts] is not to be read.
        """
        is_absent_LE = (self._state == _ABSENT).reshape(elsewhere_LE.shape) & ~elsewhere_LE
        experts, layers = np.nonzero(is_absent_LE.T)
        indices = layers * self._num_experts + experts
        for members, percent in self._quotas:
            indices = np.delete(
                indices, np.flatnonzero(members[indices])[max(0, self._num_left(members, percent)) :]
            )
        queue = deque(indices[: len(self._free_slots)].tolist())
        return self._take_slots(queue, len(queue), highest_pin=_FREE, is_prefetch=False)

    def arrived(self, expert: ExpertId) -> None:
        """A read ended well."""
        self._set_present(self._index(expert))
        self._num_reading -= 1

    def dropped(self, expert: ExpertId) -> None:
        """A read was cancelled or failed: the expert is absent again."""
        index = self._index(expert)
        self._state[index] = _ABSENT
        self._num_reading -= 1
        self._free_slots.append(int(self._slots[index]))
        if index in self._ahead:
            self._ahead.discard(index)
            self.counters.prefetches_wasted += 1

    def is_used(self, expert: ExpertId) -> bool:
        """Whether the layer at hand waits for it, or has yet to compute it."""
        return bool(self._pins[self._index(expert)] == _USED)

    def release(self, layer: int, experts: Iterable[int]) -> None:
        """These have been computed."""
        for expert in experts:
            self._pins[layer * self._num_experts + expert] = _FREE

    def lend(self, expert: ExpertId, *, is_used: bool) -> int | None:
        """The slot of a present expert, which stays there until `return_loan` or `give_up`; None where there is none
        to be lent.

        Args:
            is_used: whoever borrows it computes the layer at hand with it.
        """
        index = self._index(expert)
        if self._state[index] != _PRESENT or self._lent[index] or not self._can_lend():
            return None
        if is_used and index in self._ahead:
            self._ahead.discard(index)
            self.counters.prefetches_useful += 1
            # Read for this use, which whoever borrows it will count as a hit.
            self.counters.misses += 1
            self.counters.hits -= 1
        self._lent[index] = True
        self._num_lent += 1
        return int(self._slots[index])

    def return_loan(self, expert: ExpertId) -> None:
        """It is lent no more."""
        index = self._index(expert)
        assert self._lent[index]
        self._lent[index] = False
        self._num_lent -= 1

    def give_up(self, expert: ExpertId) -> bool:
        """What was lent, or being received, is here no more. Returns whether it was here."""
        index = self._index(expert)
        was_present = bool(self._state[index] == _PRESENT)
        if was_present:
            self.return_loan(expert)
        else:
            assert self._state[index] == _RECEIVING
            self._num_lent -= 1
        self._state[index] = _ABSENT
        self._pins[index] = _FREE
        self._ahead.discard(index)  # neither useful nor wasted: its home is where it is computed
        self._free_slots.append(int(self._slots[index]))
        return was_present

    def take_room(self, expert: ExpertId) -> tuple[int, ExpertId | None] | None:
        """A slot to receive an expert in that leaves a device, and who is evicted for it; None where nobody here is
        worth less."""
        index, victim = self._index(expert), None
        if self._state[index] != _ABSENT or not self._can_lend():
            return None
        group = next((quota for quota in self._quotas if quota[0][index]), None)
        is_full = group is not None and self._num_left(*group) <= 0
        if self._free_slots and not is_full:
            slot = self._free_slots.pop()
        else:
            values = self._policy.values().ravel()
            victim = next(iter(self._victims([index], 1, _FREE)), None)
            if victim is None or not values[victim] < values[index]:
                return None
            if is_full and group is not None and not group[0][victim]:
                return None
            slot = int(self._slots[victim])
            self._evict(victim)
        self._state[index] = _RECEIVING
        self._slots[index] = slot
        self._num_lent += 1
        return slot, None if victim is None else self._expert(victim)

    def received(self, expert: ExpertId) -> None:
        """It has arrived from the device."""
        self._set_present(self._index(expert))
        self._num_lent -= 1

    def _set_present(self, index: int) -> None:
        self._state[index] = _PRESENT
        self._num_arrivals += 1
        self._arrivals[index] = self._num_arrivals

    def _can_lend(self) -> bool:
        """Whether a slot stays that reads can go to."""
        return self._num_lent + 1 < self._num_slots

    def abandon(self) -> None:
        """The step has failed: nothing is used or expected any more. Reads under way go on."""
        self._pins[:] = _FREE
        self._wanted.clear()
        self._expected.clear()
        self._unwanted.clear()
        self._ahead.clear()

    def shrink(self, num_slots: int) -> list[ExpertId]:
        """Use only the first slots from now on, at least 1, and evict who is in the others; while nothing is read."""
        assert 1 <= num_slots <= self._num_slots
        assert self._num_reading == self._num_lent == 0
        self.abandon()
        self._num_slots = num_slots
        self._free_slots = [slot for slot in self._free_slots if slot < num_slots]
        evicted = np.flatnonzero((self._state == _PRESENT) & (self._slots >= num_slots)).tolist()
        for index in evicted:
            self._evict(index)
        return [self._expert(index) for index in evicted]

    def _end_expectation(self, first: int, used: Sequence[int]) -> int:
        """Settle what was expected of the layer whose experts begin at this index; returns how many are useful."""
        counters, indices = self.counters, {first + expert for expert in used}
        layer = range(first, first + self._num_experts)
        # What is expected of later layers will be told anew.
        self._expected.clear()
        num_useful = 0
        for index in [index for index in self._ahead if index in layer]:
            self._ahead.remove(index)
            if index not in indices:
                counters.prefetches_wasted += 1
                if self._state[index] == _READING:
                    self._unwanted.append(index)
            elif self._state[index] == _READING:
                counters.prefetches_late += 1
            else:
                num_useful += 1
        counters.prefetches_useful += num_useful
        # Pins of the layers before have been released; these are expectations, right or wrong.
        self._pins[layer.start : layer.stop] = _FREE
        return num_useful

    def _take_slots(self, queue: deque[int], most: int, *, highest_pin: int, is_prefetch: bool) -> list[Load]:
        """Loads for the first of a queue, as many as there are slots.

        Args:
            highest_pin: present experts with a pin up to this one may be evicted.
        """
        count = min(len(queue), most, self._most_reads - self._num_reading)
        if count <= 0:
            return []
        incoming = list(islice(queue, count))
        num_victims = max(count - len(self._free_slots), min(count, len(self._beyond_quotas(incoming))))
        victims = self._victims(incoming, num_victims, highest_pin) if num_victims else []
        slots: list[tuple[int, int | None]] = []
        while self._free_slots and len(slots) + len(victims) < count:
            slots.append((self._free_slots.pop(), None))
        slots += [(int(self._slots[index]), index) for index in victims]
        loads = []
        for slot, victim in slots:
            index = queue.popleft()
            if victim is not None:
                self._evict(victim)
            self._state[index] = _READING
            self._num_reading += 1
            self._slots[index] = slot
            if is_prefetch:
                self._ahead.add(index)
                self.counters.prefetches += 1
            loads.append(
                Load(
                    expert=self._expert(index),
                    slot=slot,
                    evicts=None if victim is None else self._expert(victim),
                    is_prefetch=is_prefetch,
                )
            )
        return loads

    def _num_left(self, members: NDArray[np.bool_], percent: int) -> int:
        """Slots that a group may still take; negative where it has more than its quota."""
        num_held = int(np.count_nonzero(members & (self._state != _ABSENT)))
        return self._num_slots * percent // 100 - num_held

    def _beyond_quotas(self, incoming: Sequence[int]) -> list[int]:
        """Who is to go before anybody else if these come: first those whose own group's come."""
        own: list[int] = []
        others: list[int] = []
        if not self._quotas:
            return own
        values = self._policy.values().ravel()
        for members, percent in self._quotas:
            num_incoming = int(np.count_nonzero(members[incoming]))
            num_beyond = max(0, num_incoming - self._num_left(members, percent))
            evictable = np.flatnonzero(members & (self._state == _PRESENT) & (self._pins == _FREE) & ~self._lent)
            least = evictable[np.argsort(values[evictable])][:num_beyond].tolist()
            own += least[:num_incoming]
            others += least[num_incoming:]
        return own + others

    def _victims(self, incoming: Sequence[int], count: int, highest_pin: int) -> list[int]:
        """The present experts that are beyond a quota, then those worth least, the least first; fewer than `count` if
        there are no more. Of those worth the same the one that came last: what lies in its slot is likelier to be in
        the processor's cache, where writing over it is faster.

        Args:
            incoming: who takes their slots.
        """
        values = self._policy.values().ravel()
        chosen = self._beyond_quotas(incoming)[:count]
        is_evictable = (self._state == _PRESENT) & ~self._lent
        is_evictable[chosen] = False
        for pin in range(_FREE, highest_pin + 1):
            left = count - len(chosen)
            if left == 0:
                break
            candidates = np.flatnonzero(is_evictable & (self._pins == pin))
            if len(candidates) > left:
                least = np.partition(values[candidates], left - 1)[left - 1]
                candidates = candidates[values[candidates] <= least]
            order = np.lexsort((-self._arrivals[candidates], values[candidates]))
            chosen += candidates[order[:left]].tolist()
        return chosen

    def _evict(self, index: int) -> None:
        self._state[index] = _ABSENT
        self._pins[index] = _FREE
        self.counters.evictions += 1
        if index in self._ahead:
            self._ahead.discard(index)
            self.counters.prefetches_wasted += 1

    def _index(self, expert: ExpertId) -> int:
        return expert.layer * self._num_experts + expert.expert

    def _expert(self, index: int) -> ExpertId:
        return ExpertId(*divmod(index, self._num_experts))


def distinct(ids_TK: NDArray[np.integer]) -> list[int]:
    """The experts of some tokens, those of most tokens first, of a single token the likeliest first; -1 is none."""
    if len(ids_TK) == 1:
        return [expert for expert in dict.fromkeys(map(int, ids_TK[0])) if expert >= 0]
    counts_E = np.bincount(ids_TK[ids_TK >= 0])
    return list(map(int, np.argsort(-counts_E, kind="stable")[: np.count_nonzero(counts_E)]))
