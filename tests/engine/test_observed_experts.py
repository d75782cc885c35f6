"""Watching experts: what is counted, and when it is timed."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from localmoe.core.inspection import LayerTimes
from localmoe.core.model import ModelShape
from localmoe.core.protocols import Routed
from localmoe.engine import observed_experts
from localmoe.engine.observed_experts import ObservedExperts
from support.models import routed_to

L, E, K = 3, 8, 2
SHAPE = ModelShape(
    model_type="mixtral",
    num_layers=L,
    hidden_size=4,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    num_experts=E,
    top_k=K,
    expert_size=4,
    vocab_size=10,
    max_context_tokens=10,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


class SlowExperts:
    """Layer i waits for i seconds, and computes for 10; by a clock of its own."""

    def __init__(self) -> None:
        self.now_s = self.stall_s = 0.0
        self.phases: list[list[bool]] = []
        self.fails = False

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        self.phases.append(list(is_prompt_T))
        self.now_s += 1000.0  # before the first layer begins

    def state(self) -> None:
        return None

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        self.now_s += 10.0 + routed.layer
        self.stall_s += routed.layer
        if self.fails:
            raise RuntimeError("broken")
        x_TD += 1


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowExperts:
    slow = SlowExperts()
    monkeypatch.setattr(observed_experts, "time", SimpleNamespace(perf_counter=lambda: slow.now_s))
    return slow


@pytest.fixture
def experts(slow: SlowExperts) -> ObservedExperts:
    return ObservedExperts(slow, SHAPE, stall_s=lambda: slow.stall_s, present=lambda: np.ones((L, E), np.bool_))


def run_step(experts: ObservedExperts, is_prompt_T: list[bool], rng: np.random.Generator) -> np.ndarray:
    """A step of random choices; returns their counts [L, E]."""
    counts_LE = np.zeros((L, E), np.int64)
    experts.begin_step(is_prompt_T)
    for layer in range(L):
        ids_TK = np.stack([rng.permutation(E)[:K] for _ in is_prompt_T]).astype(np.int32)
        x_TD = torch.zeros(len(is_prompt_T), 4)
        experts(routed_to(layer, x_TD, torch.from_numpy(ids_TK), torch.ones(ids_TK.shape)), x_TD)
        assert bool((x_TD == 1).all())
        np.add.at(counts_LE[layer], ids_TK, 1)
    return counts_LE


def test_every_choice_is_counted_however_many_there_are(slow: SlowExperts, experts: ObservedExperts) -> None:
    rng = np.random.default_rng(0)
    counts_LE = np.zeros((L, E), np.int64)
    for num_steps, num_tokens in ((3, 1), (200, 1), (40, 100)):
        for _ in range(num_steps):
            counts_LE += run_step(experts, [num_tokens > 1] * num_tokens, rng)
        assert experts.heat() == counts_LE.tolist()
    assert slow.phases == [[False]] * 203 + [[True] * 100] * 40


def test_choices_do_not_pile_up(experts: ObservedExperts) -> None:
    rng = np.random.default_rng(0)
    for num_tokens in (1, 500):
        for _ in range(300):
            run_step(experts, [False] * num_tokens, rng)
            pending = [ids_TK for layer in experts._pending for ids_TK in layer]
            assert len(pending) <= 64 * L
            assert sum(map(len, pending)) <= (1024 + 500) * L


def test_layers_are_timed_by_phase_and_apart_from_waiting(experts: ObservedExperts) -> None:
    rng = np.random.default_rng(0)
    assert experts.layer_times() == []
    for _ in range(4):
        run_step(experts, [False], rng)
    decode = LayerTimes(phase="decode", num_steps=4, compute_s=[10.0] * L, stall_s=[0.0, 1.0, 2.0])
    assert experts.layer_times() == [decode]
    run_step(experts, [False, True, True], rng)
    assert experts.layer_times() == [
        decode,
        LayerTimes(phase="prefill", num_steps=1, compute_s=[10.0] * L, stall_s=[0.0, 1.0, 2.0]),
    ]
    assert experts.totals() == (5 * L, 5 * 33.0)


def test_a_step_that_fails_does_not_lengthen_the_next(slow: SlowExperts, experts: ObservedExperts) -> None:
    rng = np.random.default_rng(0)
    slow.fails = True
    with pytest.raises(RuntimeError):
        run_step(experts, [False], rng)
    slow.fails = False
    experts.forget()
    counts_LE = run_step(experts, [False], rng)
    assert experts.heat() == counts_LE.tolist()
    assert experts.totals() == (L, 33.0)


def test_layers_that_are_only_launched_are_not_timed(slow: SlowExperts) -> None:
    present = np.ones((L, E), np.bool_)
    launched = ObservedExperts(slow, SHAPE, stall_s=lambda: 0.0, present=lambda: present, is_timed=False)
    run_step(launched, [False], np.random.default_rng(0))
    assert launched.layer_times() == []
    assert launched.totals() == (0, 0.0)
    assert np.sum(launched.heat()) == L * K
