"""Homes on a device: who moves in, who goes, and how calm it stays."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from localmoe.core.model import ExpertId
from localmoe.residency.device import DeviceResidency, ToldElsewhere
from localmoe.residency.policy import Lfu


class Valued:
    """A policy whose values a test sets."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.values_LE = np.zeros((num_layers, num_experts))

    def observe(self, layer: int, experts: ArrayLike, *, prefill: bool) -> None:
        raise AssertionError("others do that")

    def values(self) -> NDArray[np.float64]:
        return self.values_LE


def residency(num_slots: int, num_layers: int = 4, num_experts: int = 25) -> tuple[DeviceResidency, Valued]:
    policy = Valued(num_layers, num_experts)
    return (
        DeviceResidency(num_layers=num_layers, num_experts=num_experts, num_slots=num_slots, policy=policy),
        policy,
    )


def move_in(device: DeviceResidency, expert: ExpertId) -> ExpertId | None:
    victim = device.move_in(expert, device.take_landing())
    if victim is not None:
        device.move_out(victim)
    return victim


def fill(device: DeviceResidency) -> None:
    for layer, expert in np.argwhere(~device.present()).tolist():
        if device.is_full:
            return
        assert move_in(device, ExpertId(layer, expert)) is None


def test_some_slots_are_always_free_to_land_in() -> None:
    for num_slots, num_landing in ((1, 1), (2, 1), (4, 1), (8, 2), (64, 8), (90, 8)):
        device, _ = residency(num_slots)
        fill(device)
        assert device.num_landing == num_landing
        assert device.num_home == num_slots - num_landing
        assert device.num_free == num_landing
    device, _ = residency(1)
    assert not device.is_wanted(ExpertId(0, 0))
    assert device.wanted(np.ones((4, 25), np.bool_)) == []


def test_who_is_worth_least_goes() -> None:
    device, policy = residency(10)
    fill(device)
    policy.values_LE[0] = np.arange(25) + 5.0
    policy.values_LE[0, 3] = 1.0
    newcomer = ExpertId(2, 2)
    policy.values_LE[2, 2] = 1.0
    assert not device.is_wanted(newcomer)
    policy.values_LE[2, 2] = 1.1
    assert device.is_wanted(newcomer)
    assert move_in(device, newcomer) == ExpertId(0, 3)
    assert device.slots(0)[3] == -1
    assert device.present().sum() == device.num_home


def test_those_of_ram_that_are_worth_it_are_wanted_the_best_first() -> None:
    device, policy = residency(10)
    in_ram = np.zeros((4, 25), np.bool_)
    in_ram[1, :12] = True
    policy.values_LE[1] = np.arange(25)
    assert [expert.expert for expert in device.wanted(in_ram)] == [11, 10, 9, 8, 7, 6, 5, 4]
    fill(device)  # of layer 0
    policy.values_LE[0] = 8.5
    assert [expert.expert for expert in device.wanted(in_ram)] == [11, 10, 9]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_noise_moves_few(seed: int) -> None:
    """Experts that are all worth about the same hardly change places."""
    rng = np.random.default_rng(seed)
    device, policy = residency(68)
    policy.values_LE[:] = 10 + rng.normal(size=(4, 25))
    fill(device)
    moves = []
    for _ in range(40):
        noise = 0.02 * rng.normal(size=(4, 25))
        policy.values_LE += noise
        wanted = device.wanted(~device.present())
        moved = [move_in(device, expert) for expert in wanted if device.is_wanted(expert)]
        moves.append(len(moved))
        policy.values_LE -= noise
    assert sum(moves[-20:]) <= 20
    worst_here = np.sort(policy.values_LE[device.present()])[6]
    assert worst_here > np.quantile(policy.values_LE, 0.4) - 0.2  # the best six in ten are here, or nearly


def test_a_policy_told_elsewhere_has_the_same_values() -> None:
    policy = Lfu(1, 3)
    told = ToldElsewhere(policy)
    told.observe(0, [1], prefill=False)
    assert not told.values().any()
    policy.observe(0, [1], prefill=False)
    assert told.values().argmax() == 1
