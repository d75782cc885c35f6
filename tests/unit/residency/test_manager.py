"""The manager against a simulated disk."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from localmoe.core.model import ExpertId
from localmoe.core.plans import Load
from localmoe.residency.manager import ResidencyManager
from localmoe.residency.policy import PolicyName, retention_policy


class FixedValues:
    """A policy with opinions that do not change."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.seen: list[tuple[int, tuple[int, ...], bool]] = []
        self._values = np.zeros((num_layers, num_experts))

    def prefer(self, layer: int, expert: int, value: float) -> None:
        self._values[layer, expert] = value

    def observe(self, layer: int, experts: ArrayLike, *, prefill: bool) -> None:
        self.seen.append((layer, tuple(np.ravel(experts)), prefill))

    def values(self) -> NDArray[np.float64]:
        return self._values


def make(num_slots: int, most_reads: int = 8) -> tuple[ResidencyManager, FixedValues]:
    policy = FixedValues(3, 8)
    manager = ResidencyManager(
        num_layers=3, num_experts=8, num_slots=num_slots, most_reads=most_reads, policy=policy
    )
    return manager, policy


def need(
    manager: ResidencyManager, layer: int, decoded: Sequence[int], prompt: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """One token decoded, and one of a prompt."""
    tokens = [np.array([ids], np.int32) if ids else np.zeros((0, 1), np.int32) for ids in (prompt, decoded)]
    return manager.need(layer, *tokens)


def loads(manager: ResidencyManager, most_prefetches: int = 0) -> list[Load]:
    return manager.plan(most_prefetches)


def run_layer(manager: ResidencyManager, layer: int, used: list[int]) -> None:
    """Use these experts, whatever has to be read for it."""
    ready, waiting = need(manager, layer, used)
    while ready or waiting:
        manager.release(layer, ready)
        arrived = loads(manager)
        for load in arrived:
            manager.arrived(load.expert)
        ready = [load.expert.expert for load in arrived]
        waiting = [expert for expert in waiting if expert not in ready]


def present(manager: ResidencyManager, layer: int, experts: Sequence[int]) -> list[int]:
    """Which of them are in memory; ends the layer."""
    ready, _ = need(manager, layer, list(experts))
    manager.abandon()
    return ready


def test_absent_experts_are_read_once_in_the_order_given() -> None:
    manager, policy = make(num_slots=4)
    assert need(manager, 1, [5, 2], [7, 2]) == ([], [5, 2, 7])
    assert policy.seen == []
    manager.learn()
    manager.learn()
    assert policy.seen == [(1, (7, 2), True), (1, (5, 2), False)]
    found = loads(manager)
    assert [load.expert for load in found] == [ExpertId(1, 5), ExpertId(1, 2), ExpertId(1, 7)]
    assert len({load.slot for load in found}) == 3
    assert not any(load.is_prefetch or load.evicts for load in found)
    assert loads(manager) == []
    for load in found:
        manager.arrived(load.expert)
    manager.release(1, [5, 2, 7])
    assert need(manager, 1, [2, 5]) == ([2, 5], [])
    assert (manager.counters.hits, manager.counters.misses) == (2, 3)


def test_the_expert_worth_least_goes_and_what_is_used_stays() -> None:
    manager, policy = make(num_slots=3)
    for expert, value in ((0, 3.0), (1, 1.0), (2, 2.0)):
        policy.prefer(0, expert, value)
    run_layer(manager, 0, [0, 1, 2])
    need(manager, 0, [1, 3])  # 1 is worth least, but used
    (load,) = loads(manager)
    assert (load.expert, load.evicts) == (ExpertId(0, 3), ExpertId(0, 2))
    assert manager.counters.evictions == 1


def test_more_experts_than_slots_go_through_in_waves() -> None:
    manager, _ = make(num_slots=2)
    need(manager, 0, [], list(range(8)))
    first = loads(manager)
    assert len(first) == 2
    assert loads(manager) == []  # nothing may be given up yet
    manager.arrived(first[1].expert)
    manager.release(0, [first[1].expert.expert])
    (second,) = loads(manager)
    assert second.evicts == first[1].expert
    assert second.slot == first[1].slot


def test_a_prompt_passes_through_as_many_slots_as_there_are_reads_under_way() -> None:
    manager, policy = make(num_slots=6, most_reads=2)
    for expert in range(4):
        policy.prefer(0, expert, 1.0)
    run_layer(manager, 0, [0, 1, 2, 3])
    need(manager, 1, [], list(range(8)))
    num_read = 0
    while under_way := loads(manager):
        assert len(under_way) <= 2
        num_read += len(under_way)
        for load in under_way:
            assert load.evicts is None or load.evicts.layer == 1
            manager.arrived(load.expert)
            manager.release(1, [load.expert.expert])
    assert num_read == 8
    assert present(manager, 0, range(8)) == [0, 1, 2, 3]


def test_reading_ahead_waits_for_what_is_needed_and_is_bounded() -> None:
    manager, _ = make(num_slots=8)
    need(manager, 0, [0, 1])
    manager.expect(1, [4, 5, 6])
    found = loads(manager, most_prefetches=2)
    assert [(load.expert, load.is_prefetch) for load in found] == [
        (ExpertId(0, 0), False),
        (ExpertId(0, 1), False),
        (ExpertId(1, 4), True),
        (ExpertId(1, 5), True),
    ]
    assert loads(manager, most_prefetches=2) == []
    manager.arrived(ExpertId(1, 4))
    assert [load.expert for load in loads(manager, most_prefetches=2)] == [ExpertId(1, 6)]


def test_what_is_needed_is_not_held_up_by_what_is_expected() -> None:
    manager, _ = make(num_slots=2)
    run_layer(manager, 1, [0, 1])
    need(manager, 0, [3, 4])
    manager.expect(1, [0, 1])
    assert {load.evicts for load in loads(manager, 8)} == {ExpertId(1, 0), ExpertId(1, 1)}


def test_what_is_expected_is_kept_while_there_is_a_choice() -> None:
    manager, policy = make(num_slots=3)
    run_layer(manager, 1, [0, 1, 2])
    policy.prefer(1, 1, 5.0)
    policy.prefer(1, 2, 5.0)
    manager.expect(1, [0])
    need(manager, 0, [3])
    (load,) = loads(manager, 8)
    assert load.evicts in (ExpertId(1, 1), ExpertId(1, 2))


def test_reading_ahead_evicts_nothing_that_is_expected() -> None:
    manager, _ = make(num_slots=2)
    run_layer(manager, 1, [0, 1])
    need(manager, 0, [])
    manager.expect(1, [0, 1, 2, 3])
    assert loads(manager, most_prefetches=8) == []


def test_predictions_are_settled_when_their_layer_comes() -> None:
    manager, _ = make(num_slots=8)
    need(manager, 0, [])
    manager.expect(1, [0, 1, 2, 3])
    loads(manager, most_prefetches=8)
    for expert in (0, 2):
        manager.arrived(ExpertId(1, expert))
    assert need(manager, 1, [0, 1, 7]) == ([0], [1, 7])  # 2 is there in vain, 3 is still being read
    assert manager.take_unwanted() == [ExpertId(1, 3)]
    assert manager.take_unwanted() == []
    assert [load.expert for load in manager.plan(8)] == [ExpertId(1, 7)]
    counters = manager.counters
    assert (counters.prefetches, counters.prefetches_useful, counters.prefetches_late) == (4, 1, 1)
    assert counters.prefetches_wasted == 2
    assert (counters.hits, counters.misses) == (0, 3)
    manager.dropped(ExpertId(1, 3))
    assert counters.prefetches_wasted == 2


def test_predictions_of_a_layer_after_the_next_outlive_the_next() -> None:
    manager, _ = make(num_slots=8)
    need(manager, 0, [])
    manager.expect(1, [0])
    manager.expect(2, [5])
    assert len(loads(manager, most_prefetches=8)) == 2
    need(manager, 1, [0])
    manager.arrived(ExpertId(2, 5))
    need(manager, 2, [5])
    assert manager.counters.prefetches_useful == 1


def test_a_read_that_failed_leaves_a_free_slot_and_can_be_repeated() -> None:
    manager, _ = make(num_slots=1)
    need(manager, 0, [3])
    (load,) = loads(manager)
    assert manager.is_used(ExpertId(0, 3))
    manager.dropped(load.expert)
    manager.abandon()
    assert not manager.is_used(ExpertId(0, 3))
    need(manager, 0, [3])
    (again,) = loads(manager)
    assert (again.expert, again.evicts) == (load.expert, None)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 24), st.integers(1, 9), st.integers(0, 4), st.integers(0, 2), st.integers(0, 2**32))
@example(6, 4, 4, 2, 2)  # wrong ahead, and used in the next step before it was dropped
def test_every_layer_ends_and_no_slot_is_used_twice(
    num_slots: int, most_reads: int, most_prefetches: int, lookahead: int, seed: int
) -> None:
    draw = random.Random(seed)
    manager, policy = make(num_slots, most_reads)
    slots: dict[int, ExpertId] = {}
    reading: list[ExpertId] = []
    for layer in [0, 1, 2] * 6:
        for expert in range(8):
            policy.prefer(layer, expert, draw.random())
        used = draw.sample(range(8), draw.randint(0, 8))
        num_decoded = draw.randint(0, len(used))
        ready, waiting = need(manager, layer, used[:num_decoded], used[num_decoded:])
        for expert in manager.take_unwanted():
            if expert in reading and draw.random() < 0.5:
                reading.remove(expert)
                manager.dropped(expert)
                del slots[next(slot for slot, owner in slots.items() if owner == expert)]
        for later in range(layer + 1, min(layer + 1 + lookahead, 3)):
            manager.expect(later, draw.sample(range(8), draw.randint(0, 8)))
        while ready or waiting:
            assert all(ExpertId(layer, expert) in slots.values() for expert in ready)
            part = draw.randint(0, len(ready))
            manager.release(layer, ready[:part])
            ready = ready[part:]
            plan = manager.plan(most_prefetches)
            for load in plan:
                assert slots.get(load.slot) == load.evicts
                assert load.evicts not in reading
                assert load.evicts is None or load.evicts.expert not in ready or load.evicts.layer != layer
                assert 0 <= load.slot < num_slots
                slots[load.slot] = load.expert
                reading.append(load.expert)
            assert len(reading) <= most_reads
            ahead = [load.expert for load in plan if load.is_prefetch]
            assert all(expert.layer > layer for expert in ahead)
            assert len(ahead) <= most_prefetches
            assert len(set(slots.values())) == len(slots)
            if reading and draw.random() < 0.8:
                arrived = reading.pop(draw.randrange(len(reading)))
                manager.arrived(arrived)
                if arrived.layer == layer and arrived.expert in waiting:
                    waiting.remove(arrived.expert)
                    ready.append(arrived.expert)
            else:
                assert ready or reading or not waiting, "nothing is under way, and the layer waits"


@pytest.mark.parametrize("num_slots", [0, -1])
def test_an_arena_without_slots_is_no_arena(num_slots: int) -> None:
    with pytest.raises(AssertionError):
        make(num_slots)


def test_what_is_lent_stays_until_it_is_returned() -> None:
    manager, _ = make(num_slots=3)
    run_layer(manager, 0, [0, 1, 2])
    assert manager.lend(ExpertId(0, 0), is_used=True) is not None
    assert manager.lend(ExpertId(0, 0), is_used=True) is None  # it is
    assert manager.lend(ExpertId(0, 5), is_used=True) is None  # not here
    assert manager.lend(ExpertId(0, 1), is_used=True) is not None
    assert manager.lend(ExpertId(0, 2), is_used=True) is None  # reads need a slot
    for expert in (3, 4, 5, 6):
        run_layer(manager, 1, [expert])
    run_layer(manager, 0, [0, 1])  # what is lent may be used
    assert present(manager, 0, [0, 1, 2]) == [0, 1]
    manager.return_loan(ExpertId(0, 0))
    run_layer(manager, 1, [3, 4])
    assert present(manager, 0, [0, 1, 2]) == [1]


def test_what_moves_out_leaves_its_slot_to_others() -> None:
    manager, _ = make(num_slots=2)
    run_layer(manager, 0, [0, 1])
    assert manager.lend(ExpertId(0, 0), is_used=True) is not None
    assert manager.give_up(ExpertId(0, 0))
    assert manager.num_present == 1
    run_layer(manager, 1, [7])
    assert present(manager, 0, [0, 1]) == [1]
    assert manager.counters.evictions == 0


def test_what_comes_back_drives_out_who_is_worth_less() -> None:
    manager, policy = make(num_slots=3)
    assert manager.take_room(ExpertId(2, 0)) is not None
    run_layer(manager, 0, [0, 1])
    assert present(manager, 2, [0]) == []  # not yet
    manager.received(ExpertId(2, 0))
    assert present(manager, 2, [0]) == [0]
    for expert, value in ((0, 2.0), (1, 3.0)):
        policy.prefer(0, expert, value)
    policy.prefer(2, 0, 5.0)
    policy.prefer(2, 1, 2.0)
    assert manager.take_room(ExpertId(2, 1)) is None  # worth no more than anybody here
    policy.prefer(2, 1, 2.5)
    room = manager.take_room(ExpertId(2, 1))
    assert room is not None
    assert room[1] == ExpertId(0, 0)
    assert not manager.give_up(ExpertId(2, 1))  # it does not come after all
    assert present(manager, 0, [0, 1]) == [1]
    assert manager.num_present == 2


def test_a_prefetched_expert_that_is_lent_was_useful() -> None:
    manager, _ = make(num_slots=3)
    need(manager, 0, [0])
    manager.expect(1, [4])
    for load in [*loads(manager, 1), *loads(manager, 1)]:
        manager.arrived(load.expert)
    before = manager.counters.hits, manager.counters.misses
    assert manager.lend(ExpertId(1, 4), is_used=True) is not None
    # A miss; the borrower counts a hit.
    assert (manager.counters.hits, manager.counters.misses) == (before[0] - 1, before[1] + 1)
    need(manager, 1, [])
    assert manager.counters.prefetches_useful == 1
    assert manager.counters.prefetches_wasted == 0


def test_a_prefetched_expert_that_moves_out_was_not_useful_for_that() -> None:
    manager, _ = make(num_slots=4)
    need(manager, 0, [0])
    manager.expect(1, [4, 5])
    for load in [*loads(manager, 2), *loads(manager, 2)]:
        manager.arrived(load.expert)
    assert manager.lend(ExpertId(1, 4), is_used=False) is not None
    assert manager.give_up(ExpertId(1, 4))
    assert manager.lend(ExpertId(1, 5), is_used=False) is not None
    assert manager.counters.prefetches_useful == 0
    need(manager, 1, [5])  # computed here while it is copied
    assert manager.counters.prefetches_useful == 1
    assert manager.counters.prefetches_wasted == 0


def test_of_equals_the_latest_goes() -> None:
    manager, policy = make(num_slots=4)
    for expert in (6, 2, 4, 1):
        run_layer(manager, 0, [expert])
    policy.prefer(0, 1, 1.0)  # the latest, but worth more
    need(manager, 1, [3, 5])
    assert [load.evicts for load in loads(manager)] == [ExpertId(0, 4), ExpertId(0, 2)]


def test_every_use_is_learned_in_order() -> None:
    manager, policy = make(num_slots=4)
    need(manager, 0, [1])
    need(manager, 1, [2])  # a layer that failed before it learned
    manager.abandon()
    need(manager, 0, [3])
    manager.learn()
    assert policy.seen == [(0, (1,), False), (1, (2,), False), (0, (3,), False)]


@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
def test_no_expert_counts_for_nobody(policy: PolicyName) -> None:
    values = []
    for nobody in (-1, None):
        judged = retention_policy(policy, 2, 8)
        for layer in (0, 1):
            judged.observe(layer, [[1, 2], [3, nobody]] if nobody else [[1, 2], [3, 3]], prefill=True)
            judged.observe(layer, [5, nobody] if nobody else [5], prefill=False)
        values.append(judged.values())
    assert np.argsort(values[0], axis=None).tolist() == np.argsort(values[1], axis=None).tolist()
    assert values[0][:, 7] == pytest.approx(values[0][:, 6])  # the last is not who -1 would name
