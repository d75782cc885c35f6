"""Shares of RAM that groups of experts may hold at most."""

import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from localmoe.core.errors import ConfigError
from localmoe.core.model import ExpertId
from localmoe.residency.manager import ResidencyManager
from localmoe.residency.placement import quotas, with_rules
from localmoe.residency.policy import Lru

NUM_LAYERS, NUM_EXPERTS = 4, 8
SIZE = (NUM_LAYERS, NUM_EXPERTS)


class Drawn:
    """A policy whose values a test sets."""

    def __init__(self) -> None:
        self.all = np.zeros(SIZE)

    def observe(self, layer: int, experts: ArrayLike, *, prefill: bool) -> None:
        pass

    def values(self) -> NDArray[np.float64]:
        return self.all


def make(rules: list[str], num_slots: int, most_reads: int = 8) -> tuple[ResidencyManager, Drawn]:
    policy = Drawn()
    manager = ResidencyManager(
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        num_slots=num_slots,
        most_reads=most_reads,
        policy=policy,
        quotas=quotas(rules, *SIZE),
    )
    return manager, policy


def use(manager: ResidencyManager, layer: int, experts: list[int]) -> None:
    """Compute a layer, one expert after the other."""
    ready, waiting = manager.need(layer, np.zeros((0, 1), np.int32), np.array([experts], np.int32))
    while ready or waiting:
        loads = manager.plan(0)
        for load in loads:
            manager.arrived(load.expert)
        arrived = [load.expert.expert for load in loads]
        waiting = [expert for expert in waiting if expert not in arrived]
        ready += arrived
        manager.release(layer, ready[:1])
        ready = ready[1:]


def present(manager: ResidencyManager) -> list[tuple[int, int]]:
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(manager.present())]


def test_the_first_rule_decides_about_quotas_too() -> None:
    rules = ["layers.0.experts.[01]=ram", "layers.0.*=25%", "layers.*.experts.0= 50% ", "layers.3.*=100%"]
    first, second = quotas(rules, *SIZE)
    assert (first.percent, second.percent) == (25, 50)
    assert np.argwhere(first.experts_LE).tolist() == [[0, expert] for expert in range(2, 8)]
    assert np.argwhere(second.experts_LE).tolist() == [[1, 0], [2, 0], [3, 0]]
    values = with_rules(Lru(*SIZE), rules, *SIZE).values()
    assert np.argwhere(np.isinf(values)).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    "rule", ["layers.0.*=101%", "layers.0.*=-1%", "layers.0.*=5.5%", "layers.0.*=%", "layers=5 %"]
)
def test_what_is_no_share(rule: str) -> None:
    with pytest.raises(ConfigError, match="shares of RAM from 0% to 100%"):
        quotas([rule], *SIZE)


def test_those_beyond_go_first_whatever_they_are_worth() -> None:
    manager, policy = make(["layers.0.*=25%"], num_slots=8)
    policy.all[0] = np.arange(NUM_EXPERTS) + 100
    use(manager, 0, [0, 1, 2, 3])  # all at once: more than its share, of free slots
    assert len(present(manager)) == 4
    use(manager, 1, [0, 1, 2])
    assert present(manager) == [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]
    use(manager, 0, [7])
    assert present(manager) == [(0, 3), (0, 7), (1, 0), (1, 1), (1, 2)], "though slots are free"
    use(manager, 2, [0, 1, 2, 3])  # what is left is anybody's; one more must go, the one of least value
    assert len(present(manager)) == 8
    assert [expert for expert in present(manager) if expert[0] == 0] == [(0, 3), (0, 7)]


def test_what_a_device_gives_back_keeps_to_the_quota() -> None:
    manager, policy = make(["layers.0.*=25%"], num_slots=8)
    policy.all[0] = [3, 4, 1, 5, 0, 0, 0, 0]
    use(manager, 0, [0, 1])
    assert manager.take_room(ExpertId(0, 2)) is None, "worth less than those who have the share"
    room = manager.take_room(ExpertId(0, 3))
    assert room is not None
    assert room[1] == ExpertId(0, 0)
    assert manager.take_room(ExpertId(1, 0)) is not None, "slots are free"


def test_filling_keeps_to_the_quota() -> None:
    manager, _ = make(["layers.0.*=25%", "layers.1.*=0%"], num_slots=20)
    nowhere_LE = np.zeros(SIZE, np.bool_)
    while loads := manager.fill(nowhere_LE):
        assert all(load.evicts is None for load in loads)
        for load in loads:
            manager.arrived(load.expert)
    assert manager.present().sum(axis=1).tolist() == [5, 0, 8, 7]


def walk(
    manager: ResidencyManager, policy: Drawn, seed: int, groups: list[tuple[NDArray[np.bool_], int]]
) -> list[str]:
    """Random layers; checks the groups' quotas (members [layers, experts], slots) and returns what was decided."""
    draw = random.Random(seed)
    peaks = [0] * len(groups)
    """Most that a group had to hold at once."""
    reading: list[ExpertId] = []
    log = []
    for layer in [*range(NUM_LAYERS)] * 6:
        policy.all[:] = np.array([draw.random() for _ in range(policy.all.size)]).reshape(SIZE)
        used = draw.sample(range(NUM_EXPERTS), draw.randint(1, 4))
        ready, waiting = manager.need(layer, np.zeros((0, 1), np.int32), np.array([used], np.int32))
        for later in range(layer + 1, min(layer + 3, NUM_LAYERS)):
            manager.expect(later, draw.sample(range(NUM_EXPERTS), 2))
        while ready or waiting:
            held = (manager._state != 0).reshape(SIZE)
            free = manager.present() & (manager._pins == 0).reshape(SIZE)
            beyond = [bool((held & members).sum() > most) for members, most in groups]
            loads = manager.plan(2)
            for load in loads:
                log.append(f"{load.expert} for {load.evicts}")
                reading.append(load.expert)
            gone = np.zeros(SIZE, np.bool_)
            for load in loads:
                if load.evicts is not None:
                    gone[load.evicts.layer, load.evicts.expert] = True
            for index, (members, most) in enumerate(groups):
                held = (manager._state != 0).reshape(SIZE)
                busy = held & ~(manager.present() & (manager._pins == 0).reshape(SIZE))
                peaks[index] = max(peaks[index], int((busy & members).sum()))
                assert (held & members).sum() <= max(most, peaks[index])
                if loads and not any(is_beyond for is_beyond in beyond):
                    # Whoever came took the place of its own kind, as far as there was one to give up.
                    came = sum(bool(members[load.expert.layer, load.expert.expert]) for load in loads)
                    if came and (held & members).sum() > most:
                        assert not (free & members & ~gone).any()
            if reading:
                expert = reading.pop(draw.randrange(len(reading)))
                manager.arrived(expert)
                if expert.layer == layer and expert.expert in waiting:
                    waiting.remove(expert.expert)
                    ready.append(expert.expert)
            manager.release(layer, ready[:1])
            ready = ready[1:]
    return log


@given(st.integers(6, 24), st.integers(1, 9), st.integers(0, 99), st.integers(0, 99), st.integers(0, 2**32))
@example(12, 4, 25, 50, 1)
def test_no_group_holds_more_than_its_share_and_what_is_in_use(
    num_slots: int, most_reads: int, first: int, second: int, seed: int
) -> None:
    rules = [f"layers.0.*={first}%", f"layers.[12].experts.[0-3]={second}%"]
    manager, policy = make(rules, num_slots, most_reads)
    groups = [(quota.experts_LE, num_slots * quota.percent // 100) for quota in quotas(rules, *SIZE)]
    assert walk(manager, policy, seed, groups), "something was read"


@given(st.integers(4, 24), st.integers(1, 9), st.integers(0, 2**32))
def test_a_share_of_all_changes_nothing(num_slots: int, most_reads: int, seed: int) -> None:
    logs = [
        walk(*make(rules, num_slots, most_reads), seed, [])
        for rules in ([], ["layers.0.*=100%", "layers.*.experts.[123]=100%"])
    ]
    assert logs[0] == logs[1] != []


def test_others_may_use_what_is_left() -> None:
    manager, policy = make(["layers.0.*=50%"], num_slots=8)
    policy.all[0] = 100
    use(manager, 1, [*range(8)])
    assert manager.present().sum() == 8
    use(manager, 0, [0, 1, 2, 3, 4, 5])
    assert manager.present()[0].sum() <= 6
    use(manager, 1, [*range(8)])
    assert manager.present()[0].sum() <= 4
    assert manager.present()[1].sum() >= 4
