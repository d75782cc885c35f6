"""Retention policies: which experts they would keep, and the adaptive one against its definition written out."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from localmoe.residency.policy import Adaptive, Lfu, Lru, PolicyName, RetentionPolicy, retention_policy


def ranking(policy: RetentionPolicy, layer: int = 0) -> list[int]:
    """A layer's experts, the most worth keeping first."""
    return np.argsort(-policy.values()[layer], kind="stable").tolist()


def decode(policy: RetentionPolicy, tokens: Sequence[Sequence[int]], layer: int = 0) -> None:
    for experts in tokens:
        policy.observe(layer, experts, prefill=False)


@pytest.mark.parametrize("name", ["lru", "lfu", "adaptive"])
def test_values_cover_the_model(name: PolicyName) -> None:
    policy = retention_policy(name, 3, 5)
    assert policy.values().shape == (3, 5)
    for layer in range(3):
        policy.observe(layer, np.array([[1, 2], [2, 3]], np.int32), prefill=True)
        policy.observe(layer, [4, 1], prefill=False)
    values = policy.values()
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
    assert (values[:, 4] > values[:, 0]).all()


def test_lru_goes_by_the_last_use() -> None:
    policy = Lru(1, 4)
    policy.observe(0, np.array([[0, 1], [2, 0]]), prefill=True)
    assert ranking(policy) == [0, 2, 1, 3]
    decode(policy, [[1], [3]])
    assert ranking(policy) == [3, 1, 0, 2]


def test_lfu_goes_by_the_number_of_uses_and_forgets() -> None:
    policy = Lfu(1, 4)
    decode(policy, [[0], [0], [1]])
    assert ranking(policy)[:2] == [0, 1]
    decode(policy, [[2]] * 300 + [[1]])
    # Two uses 300 steps ago are worth less than one now.
    assert ranking(policy)[:3] == [2, 1, 0]


def test_lfu_takes_a_prompt_for_one_step() -> None:
    policy = Lfu(1, 3)
    decode(policy, [[0], [0]])
    policy.observe(0, np.array([[1]] * 100), prefill=True)
    assert ranking(policy) == [0, 1, 2]


def reference_values(
    steps: Sequence[tuple[int, NDArray[np.integer], bool]], num_layers: int, num_experts: int
) -> NDArray[np.float64]:
    """What `Adaptive` says after these (layer, experts [tokens, each], prefill), from the definition.

    Every layer must have seen the same number of tokens, or one more.
    """
    half_lives = (1, 4, 16, 64, 256)
    norm = sum(0.5 ** (1 / h) / (1 - 0.5 ** (1 / h)) / h for h in half_lives)

    def weight(age: float) -> float:
        return sum(0.5 ** (age / h) / h for h in half_lives) / norm

    tokens: list[list[tuple[NDArray[np.float64], bool]]] = [[] for _ in range(num_layers)]
    values = np.full((num_layers, num_experts), -np.inf)
    step, previous = 0, -1
    for layer, experts, prefill in steps:
        step, previous = step + (layer < previous), layer
        for token in np.atleast_2d(experts)[-128:]:
            used = np.zeros(num_experts)
            used[token] = 1
            tokens[layer].append((used, prefill))
        seen = tokens[layer]
        rates, age, prompt_age = np.zeros(num_experts), 1.0, 1.0
        for used, is_prompt in reversed(seen):
            rates += 0.2 * weight(prompt_age) * used if is_prompt else weight(age) * used
            age += 0.0 if is_prompt else 1.0
            prompt_age += 0.2 if is_prompt else 1.0
        num_pairs = min(len(seen), 128) - 1
        followed = np.zeros(num_experts)
        if num_pairs > 0:
            # Of a token that has not come to the end, the later layers are those of the token before.
            likeness = np.zeros(num_pairs)
            for uses in tokens:
                for lag in range(1, num_pairs + 1):
                    if lag < len(uses):
                        likeness[lag - 1] += uses[-1][0] @ uses[-1 - lag][0]
            likeness -= likeness.mean()
            likeness *= 2 / (np.abs(likeness).sum() + 1e-6)
            for lag in range(1, num_pairs + 1):
                followed += likeness[lag - 1] * seen[-lag][0]
        values[layer] = np.log(np.maximum(rates, 1e-4)) + 2.0 * np.maximum(followed, 0)
        values[layer] -= 0.5 * (step + layer / num_layers)
    return values


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_is_what_it_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_layers, num_experts = 3, 10
    steps: list[tuple[int, NDArray[np.integer], bool]] = []
    prompt_tokens = {0: 5, 7: 140, 12: 20}
    for step in range(20):
        for layer in range(num_layers):
            if step in prompt_tokens:
                prompt = [rng.permutation(num_experts)[:2] for _ in range(prompt_tokens[step])]
                steps.append((layer, np.stack(prompt), True))
            if step not in (0, 7):
                steps.append((layer, rng.permutation(num_experts)[: rng.integers(2, 5)], False))
    del steps[-1]  # in the middle of a step
    policy = Adaptive(num_layers, num_experts)
    for layer, experts, prefill in steps:
        policy.observe(layer, experts, prefill=prefill)
    rest = reference_values(steps, num_layers, num_experts) / 0.2 - policy.values()  # whole steps of a fifth
    assert rest.min() > -1e-3
    assert rest.max() < 1 + 1e-3
    assert (policy.values() == np.floor(policy.values())).all()


def test_adaptive_keeps_what_is_used_often_over_what_was_used_last() -> None:
    policy = Adaptive(1, 64)
    rng = np.random.default_rng(0)
    decode(policy, [[0, int(rng.integers(2, 64))] for _ in range(60)] + [[1, 2]])
    assert ranking(policy)[0] == 0


def test_adaptive_keeps_what_followed_the_like_of_now() -> None:
    # Two topics of different first layers. In the second layer, 1 follows the one and 2 the other, equally often.
    policy = Adaptive(2, 8)
    rng = np.random.default_rng(0)
    topics = rng.integers(0, 2, 120).tolist()
    for now, then in zip([0, *topics], [*topics, 0], strict=True):
        policy.observe(0, [4 + then], prefill=False)
        policy.observe(1, [1 + now], prefill=False)
    values = {}
    for topic in (0, 1):
        policy.observe(0, [4 + topic], prefill=False)
        policy.observe(1, [1], prefill=False)
        policy.observe(0, [4 + topic], prefill=False)
        policy.observe(1, [3], prefill=False)
        values[topic] = policy.values()[1, 1] - policy.values()[1, 2]
    assert values[0] > values[1]


def test_adaptive_gives_way_from_layers_just_passed_to_those_to_come() -> None:
    policy = Adaptive(4, 2)
    for _ in range(5):
        for layer in range(4):
            policy.observe(layer, [0], prefill=False)
    assert policy.values()[0, 0] > policy.values()[3, 0]
    policy.observe(0, [0], prefill=False)
    policy.observe(1, [0], prefill=False)
    assert policy.values()[2, 0] > policy.values()[1, 0]


@pytest.mark.parametrize("num_chunks", [1, 16])
def test_a_flood_of_prompt_tokens_does_not_push_out_what_decoding_uses(num_chunks: int) -> None:
    num_experts, hot = 128, list(range(8))
    adaptive, lru = Adaptive(1, num_experts), Lru(1, num_experts)
    rng = np.random.default_rng(0)
    for policy in (adaptive, lru):
        decode(policy, [rng.permutation(hot)[:4].tolist() for _ in range(200)])
        for _ in range(num_chunks):
            prompt = np.stack([8 + rng.permutation(num_experts - 8)[:4] for _ in range(512)])
            policy.observe(0, prompt, prefill=True)
    assert sorted(ranking(adaptive)[:8]) == hot
    assert not set(ranking(lru)[:8]) & set(hot)


def test_a_prompt_longer_than_history_counts_by_its_last_tokens() -> None:
    whole, end = Adaptive(1, 16), Adaptive(1, 16)
    prompt = np.random.default_rng(0).integers(0, 16, (300, 2))
    whole.observe(0, prompt, prefill=True)
    end.observe(0, prompt[-128:], prefill=True)
    np.testing.assert_array_equal(whole.values(), end.values())


def test_a_long_run_stays_finite() -> None:
    policy = Adaptive(1, 4)
    decode(policy, [[0], [1]] * 3000)
    assert np.isfinite(policy.values()).all()
    assert set(ranking(policy)[:2]) == {0, 1}
