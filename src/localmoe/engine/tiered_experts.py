"""Computes routed experts of which only some are in memory: the others are read while these are computed.

One thread directs it all. Asking the disk costs microseconds, waiting for it lets go of Python's lock, and the reads
go on in the kernel. The other compute threads go ahead with a part of the experts while this one checks what has
arrived; it helps them when it asks for the next part, or has nothing else to do. In a layer:

    need       the manager says which experts are present; reads of the absent ones begin at once, in one submission
    expect     the next layer's router looks at this layer's input; what it would choose and is absent is read after
               those, as far as the disk would otherwise be idle
    compute    what is present, then whatever has arrived, until nothing is awaited

An expert is removed before the read that replaces it begins, and placed when it has arrived and its checksum was
right. The sum over a token's experts is made at the end, in order of its choices, so results do not depend on who was
where.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.errors import ChecksumError, StoreError
from localmoe.core.events import TierState
from localmoe.core.model import ExpertId
from localmoe.core.plans import Load
from localmoe.core.protocols import Routed
from localmoe.formats.store import Store, find_damage
from localmoe.formats.stripes import Stripe
from localmoe.kernels.base import Kernels
from localmoe.residency.link import IdleLink
from localmoe.residency.manager import ResidencyManager, distinct
from localmoe.tiers.disk import DiskReader, Done, Read
from localmoe.tiers.host import HostArena

logger = logging.getLogger(__name__)

_EXPERTS_AT_ONCE = 4
"""So many are computed before arrivals are looked at, that the disk does not run dry meanwhile."""


class TieredExperts:
    """Experts of a store that are read into an arena as they are needed.

    Args:
        store: says where each expert lies; its mapping is not touched.
        reader: of the store's file, and the stripes' after it.
        stripes: where those experts are read that they hold, until one cannot be: then it is read from the store.
        arena: its slots are the manager's.
        prefetch_layers: read ahead what so many of the following layers are expected to use.
    """

    def __init__(
        self,
        store: Store,
        kernels: Kernels,
        *,
        reader: DiskReader[ExpertId],
        arena: HostArena,
        manager: ResidencyManager,
        prefetch_layers: int,
        stripes: Sequence[Stripe] = (),
    ) -> None:
        shape = store.shape
        self._store = store
        self._reader = reader
        self._arena = arena
        self._manager = manager
        self.prefetch_layers = prefetch_layers
        self._num_experts = shape.num_experts
        self._layers = [
            kernels.experts(shape.num_experts, shape.hidden_size, shape.expert_size, store.weights)
            for _ in range(shape.num_layers)
        ]
        self._entries = store.expert_entries
        self._paths = [store.path, *(stripe.path for stripe in stripes)]
        self._files = {expert: file for file, stripe in enumerate(stripes, 1) for expert in stripe.experts(store)}
        """Experts with a copy that is read in place of the store's, as indices into `_paths`."""
        self._rooms: dict[ExpertId, Tensor] = {}
        """Slots that experts come into from a device."""
        self._link = IdleLink()
        self._is_prompt_T = np.zeros(0, np.bool_)
        self._layer_ended_s = 0.0
        self._stall_s = 0.0
        self._num_failures = 0

    @property
    def stall_s(self) -> float:
        """Total time in which there was nothing to do but wait for the disk."""
        return self._stall_s

    def present(self) -> NDArray[np.bool_]:
        """Whether each expert [layers, experts] is in memory now."""
        return self._manager.present()

    def on_device(self) -> NDArray[np.bool_]:
        return np.zeros_like(self._manager.present())

    def lend(self, expert: ExpertId, *, is_used: bool) -> Tensor | None:
        slot = self._manager.lend(expert, is_used=is_used)
        return None if slot is None else self._arena.slot(slot)

    def return_loan(self, expert: ExpertId) -> None:
        self._manager.return_loan(expert)

    def give_up(self, expert: ExpertId) -> None:
        self._rooms.pop(expert, None)
        if self._manager.give_up(expert):
            self._layers[expert.layer].remove(expert.expert)

    def room_for(self, expert: ExpertId) -> Tensor | None:
        room = self._manager.take_room(expert)
        if room is None:
            return None
        slot, evicts = room
        if evicts is not None:
            self._layers[evicts.layer].remove(evicts.expert)
        self._rooms[expert] = self._arena.slot(slot)
        return self._rooms[expert]

    def received(self, expert: ExpertId) -> None:
        weights = self._store.expert_in(self._rooms.pop(expert), self._entries[expert])
        self._layers[expert.layer].place(expert.expert, weights)
        self._manager.received(expert)

    def fill(self, elsewhere_LE: NDArray[np.bool_]) -> None:
        """Read experts into free slots, the same number of every layer; between two steps.

        Args:
            elsewhere_LE: whether each expert [layers, experts] is not to be read.

        Raises:
            StoreError: one cannot be read, or is damaged.
        """
        stalled_s, num_failures = self._stall_s, self._num_failures
        self._begin(self._manager.fill(elsewhere_LE))
        while self._reader.stats().in_flight:
            self._collect(layer=-1, wait=True)
            if self._num_failures > num_failures:
                raise StoreError(f"{self._store.path}: experts are damaged, or cannot be read; the log says which")
            self._begin(self._manager.fill(elsewhere_LE))
        self._stall_s = stalled_s  # nobody was kept waiting

    def shrink(self, num_slots: int) -> None:
        """Give up slots from the end, and the memory of the slots given up; between two steps."""
        while self._reader.stats().in_flight:
            self._collect(layer=-1, wait=True)
        for expert in self._manager.shrink(num_slots):
            self._layers[expert.layer].remove(expert.expert)
        self._arena.shrink(num_slots)
        self._reader.register(self._arena.memory[: num_slots * self._arena.stride_bytes])

    def state(self) -> TierState:
        """Totals as of now."""
        disk = self._reader.stats()
        return TierState(
            num_experts=len(self._entries),
            num_slots=self._manager.num_slots,
            slot_bytes=self._arena.stride_bytes,
            num_present=self._manager.num_present,
            **asdict(self._manager.counters),
            stall_s=self._stall_s,
            disk_bytes=disk.bytes_read,
            disk_reads=disk.num_reads,
            disk_busy_s=disk.busy_s,
            disk_errors=self._num_failures,
        )

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        self._is_prompt_T = np.array(is_prompt_T, np.bool_)
        self._layer_ended_s = time.perf_counter()

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        """Raises StoreError where an expert that is used cannot be read, or is damaged."""
        stalled_s = self._stall_s
        try:
            self._compute(routed, x_TD)
        except BaseException:
            self._layers[routed.layer].compute([])  # what is still being computed may not be evicted yet
            self._manager.abandon()
            raise
        now_s = time.perf_counter()
        elapsed_s, self._layer_ended_s = now_s - self._layer_ended_s, now_s
        disk = self._reader.stats()
        self._link.observe(elapsed_s - (self._stall_s - stalled_s), disk.busy_s, disk.num_reads)

    def _compute(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        layer, manager = routed.layer, self._manager
        experts = self._layers[layer]
        computing: list[int] = []
        is_prompt_T, used_TK = self._is_prompt_T, routed.ids_TK.numpy()
        ready, awaited = manager.need(layer, used_TK[is_prompt_T], used_TK[~is_prompt_T])
        self._move()
        experts.begin(routed.h_TD, routed.ids_TK)
        for distance, choose in enumerate(routed.ahead[: self.prefetch_layers], 1):
            if manager.is_whole(layer + distance):
                continue
            manager.expect(layer + distance, distinct(choose(x_TD).numpy()))
        self._move()
        waiting = set(awaited)
        while ready or waiting:
            size = _EXPERTS_AT_ONCE if waiting else len(ready)
            part, ready = ready[:size], ready[size:]
            experts.compute(part)  # returns when the part before is computed
            manager.learn()
            manager.release(layer, computing)
            computing = part
            self._move()
            arrived = self._collect(layer, wait=bool(waiting) and not computing)
            ready += [expert for expert in arrived if expert in waiting]
            waiting.difference_update(arrived)
        experts.finish(routed.weights_TK, x_TD)
        manager.release(layer, computing)

    def _move(self) -> None:
        """Begin the reads that the manager wants now."""
        if unwanted := self._manager.take_unwanted():
            for expert in self._reader.cancel(unwanted):
                self._manager.dropped(expert)
        self._begin(self._manager.plan(self._link.most_reads_ahead))

    def _begin(self, loads: Sequence[Load]) -> None:
        """Ask for reads, each when whoever is in its slot is placed no more."""
        reads = []
        for load in loads:
            if load.evicts is not None:
                self._layers[load.evicts.layer].remove(load.evicts.expert)
            reads.append(self._read(load.expert, self._arena.slot(load.slot)))
        if reads:
            self._reader.submit(reads)

    def _read(self, expert: ExpertId, slot: Tensor) -> Read[ExpertId]:
        entry, file = self._entries[expert], self._files.get(expert, 0)
        return Read(key=expert, offset=entry.offset, num_bytes=entry.num_bytes, buffer=slot, file=file)

    def _collect(self, layer: int, *, wait: bool) -> list[int]:
        """Take what has been read, and say which of this layer's experts are among it.

        Raises:
            StoreError: one that the layer uses could not be read.
            ChecksumError: or is damaged.
        """
        started_s = time.perf_counter()
        ended = self._reader.collect(wait)
        if wait:
            self._stall_s += time.perf_counter() - started_s
            assert ended, "what the layer waits for is being read"
        arrived, failures = [], []
        for read in ended:
            expert, entry = read.key, self._entries[read.key]
            failure = self._failure(read)
            if failure is None:
                self._layers[expert.layer].place(expert.expert, self._store.expert_in(read.buffer, entry))
                self._manager.arrived(expert)
                if expert.layer == layer:
                    arrived.append(expert.expert)
                continue
            if self._files.pop(expert, None) is not None:
                logger.warning("%s; from now on it is read from %s", failure, self._store.path)
                self._reader.submit([self._read(expert, read.buffer)])
                continue
            logger.error("%s", failure)
            self._num_failures += 1
            # One that is not used, yet or any more, may be asked for again, and fail then.
            if self._manager.is_used(expert):
                failures.append(failure)
            self._manager.dropped(expert)
        if failures:
            raise failures[0]
        return arrived

    def _failure(self, read: Done[ExpertId]) -> StoreError | None:
        if read.error is not None:
            return StoreError(read.error)
        damage = find_damage(read.buffer, self._entries[read.key])
        path = self._paths[self._files.get(read.key, 0)]
        return None if damage is None else ChecksumError(f"{path}: {damage}")
