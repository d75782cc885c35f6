"""Which engine a policy picks."""

from collections import Counter
from collections.abc import Sequence

import pytest

from localmoe.core.protocols import ResourceUse
from localmoe.dispatch.config import DispatchConfig, PolicyName
from localmoe.dispatch.policy import (
    FirstToComplete,
    LeastConnections,
    Load,
    Policy,
    PrefixAffinity,
    ResourceAware,
    RoundRobin,
    WeightedRoundRobin,
    make_policy,
)
from localmoe.dispatch.replica import Replica
from localmoe.dispatch.speed import Processor
from support.replicas import FakeClock, load, make_replica


class FakeMeter:
    def __init__(self, uses: dict[int, tuple[float, float, float | None]]) -> None:
        self._uses = uses

    def resources(self, devices: Sequence[int]) -> ResourceUse:
        memory, busy, temperature = self._uses[devices[0]]
        return ResourceUse(memory_share=memory, busy_share=busy, temperature_c=temperature)


def picks(policy: Policy, candidates: Sequence[Replica], count: int, given: Load | None = None) -> list[str]:
    return [policy.choose(candidates, given or load()).name for _ in range(count)]


def test_each_in_turn() -> None:
    a, b, c = (make_replica(name) for name in "abc")
    policy = RoundRobin()
    assert picks(policy, [a, b, c], 7) == list("abcabca")
    assert picks(policy, [a, c], 3) == list("cac")  # b has no place free
    assert picks(policy, [a, b, c], 4) == list("bacb")


def test_turns_in_proportion_to_speed() -> None:
    a = make_replica("a", token_s=lambda beside: 0.01)
    b = make_replica("b", token_s=lambda beside: 0.03)
    c = make_replica("c", token_s=lambda beside: 0.06)
    names = picks(WeightedRoundRobin(), [a, b, c], 90)
    assert Counter(names) == {"a": 60, "b": 20, "c": 10}
    assert all("b" in names[i : i + 6] for i in range(84))  # spread out, not in runs


def test_speeds_that_are_not_known_count_as_usual() -> None:
    a = make_replica("a", token_s=lambda beside: 0.01)
    b = make_replica("b", token_s=lambda beside: 0.03)
    unknown = make_replica("c")
    assert Counter(picks(WeightedRoundRobin(), [a, b, unknown], 60)) == {"a": 30, "b": 10, "c": 20}
    assert picks(WeightedRoundRobin(), [make_replica("d"), make_replica("e")], 4) == list("dede")


def test_a_busy_engine_does_not_draw_ever_more() -> None:
    """Engines that batch well make more tokens a second the more they have to do."""
    a = make_replica("a", running=7, token_s=lambda beside: 0.01)
    b = make_replica("b", running=1, token_s=lambda beside: 0.01)
    assert Counter(picks(WeightedRoundRobin(), [a, b], 10)) == {"a": 5, "b": 5}


def test_an_engine_that_batches_counts_for_what_it_does_so() -> None:
    batches = make_replica("a", running=4, token_s=lambda beside: 0.02)
    does_not = make_replica("b", running=4, token_s=lambda beside: 0.02 * (1 + beside))
    assert Counter(picks(WeightedRoundRobin(), [batches, does_not], 50)) == {"a": 40, "b": 10}


def test_the_emptiest_for_its_size() -> None:
    big, small = make_replica("big", running=3, capacity=16), make_replica("small", running=1, capacity=4)
    assert picks(LeastConnections(), [small, big], 1) == ["big"]
    big.num_running = 5
    assert picks(LeastConnections(), [small, big], 1) == ["small"]


@pytest.mark.parametrize(
    ("uses", "chosen"),
    [
        ([(0.9, 0.1, 50.0), (0.5, 0.1, 50.0)], "1"),
        ([(0.5, 0.95, 50.0), (0.5, 0.7, 50.0)], "1"),
        ([(0.1, 0.1, 80.0), (0.1, 0.1, 60.0)], "1"),
        ([(0.2, 0.1, 95.0), (0.9, 0.9, 60.0)], "1"),
        ([(0.2, 0.1, 88.0), (0.9, 0.9, 95.0)], "0"),
        ([(0.9, 0.9, None), (0.8, 0.8, None)], "1"),
        ([(1.0, 1.0, None), (0.97, 0.99, 70.0)], "1"),
        ([(1.0, 1.0, None), (1.0, 1.0, None)], "1"),
    ],
)
def test_what_is_least_used(uses: list[tuple[float, float, float | None]], chosen: str) -> None:
    """Among those that are alike, the one with fewer answers under way."""
    replicas = [make_replica("0", running=2, devices=[0]), make_replica("1", running=1, devices=[1])]
    policy = ResourceAware(FakeMeter(dict(enumerate(uses))), max_temperature_c=87.0)
    assert picks(policy, replicas, 1) == [chosen]


def test_prompts_go_where_their_beginning_is() -> None:
    a, b = make_replica("a", running=2), make_replica("b")
    policy = PrefixAffinity(LeastConnections())
    assert picks(policy, [a, b], 1, load(known={"a": 60})) == ["a"]
    assert picks(policy, [a, b], 1, load(known={"a": 49})) == ["b"]  # less than half
    assert picks(policy, [a, b], 1, load(known={"a": 60, "b": 70})) == ["b"]
    assert picks(policy, [a, b], 1, load(known={"c": 100})) == ["b"]  # it has no place free
    assert picks(policy, [a, b], 1, load(prompt=0)) == ["b"]
    a.num_running = 3
    assert picks(policy, [a, b], 1, load(known={"a": 100})) == ["b"]  # so much more to do


def test_of_those_that_know_a_prompt_the_emptiest() -> None:
    a, b = make_replica("a", running=2), make_replica("b", running=1)
    assert picks(PrefixAffinity(RoundRobin()), [a, b], 2, load(known={"a": 64, "b": 64})) == ["b", "b"]


def test_the_first_to_complete_depends_on_the_request() -> None:
    """One engine computes prompts fast, the other one decodes fast."""
    prompts = make_replica("prompts", token_s=lambda b: 0.05, first_s=lambda n, b: 1e-4 * n)
    decodes = make_replica("decodes", token_s=lambda b: 0.01, first_s=lambda n, b: 1e-3 * n)
    both = [prompts, decodes]
    assert picks(FirstToComplete(FakeClock()), both, 1, load(prompt=2000, expected=8)) == ["prompts"]
    assert picks(FirstToComplete(FakeClock()), both, 1, load(prompt=50, expected=200)) == ["decodes"]


def test_the_first_to_complete_depends_on_what_is_under_way() -> None:
    fast = make_replica("fast", token_s=lambda beside: 0.01 * (1 + beside))
    slow = make_replica("slow", token_s=lambda beside: 0.03)
    policy = FirstToComplete(FakeClock())
    assert picks(policy, [fast, slow], 1, load()) == ["fast"]
    fast.num_running = 1
    assert picks(policy, [fast, slow], 1) == ["fast"]
    fast.num_running = 4
    assert picks(policy, [fast, slow], 1) == ["slow"]


def test_what_it_costs_those_under_way_counts() -> None:
    """Two engines on one processor: the slow one would be the first to complete, at the cost of four others."""
    processor = Processor()

    def learn(name: str, token_s: float) -> Replica:
        replica = make_replica(name, processor=processor)
        for turn in range(60):
            running, beside = turn % 5, turn // 5 % 5
            replica.speed.observe_first(10, running, beside, 0.01)
            replica.speed.observe_between(running, beside, token_s * (1 + 0.1 * running + 0.5 * beside))
        return replica

    fast, slow = learn("fast", 0.010), learn("slow", 0.004)
    fast.num_running = 4
    now = load(prompt=10, beside={"slow": 4})
    policy = FirstToComplete(FakeClock())
    assert policy.completion_s(slow, now) < policy.completion_s(fast, now)
    assert picks(policy, [fast, slow], 1, now) == ["fast"]


def test_what_shares_a_processor_is_feared_until_it_is_known() -> None:
    def learn(name: str, token_s: float, processor: Processor | None) -> Replica:
        replica = make_replica(name, processor=processor)
        for running in (0, 1, 2, 3) * 10:
            replica.speed.observe_first(10, running, 0, 0.01)
            replica.speed.observe_between(running, 0, token_s * (1 + running))
        return replica

    processor = Processor()
    fast, slow = learn("fast", 0.01, processor), learn("slow", 0.02, processor)
    elsewhere = learn("elsewhere", 0.02, None)
    fast.num_running = 2
    now, policy = load(beside={"slow": 2}), FirstToComplete(FakeClock())
    assert picks(policy, [fast, elsewhere], 1, now) == ["elsewhere"]
    assert picks(policy, [fast, slow], 1, now) == ["fast"]


def test_a_busy_minute_makes_no_other_engine_of_the_processor_look_fast() -> None:
    processor = Processor()
    used = make_replica("used", token_s=lambda beside: 0.010, processor=processor)
    idle = make_replica("idle", token_s=lambda beside: 0.015, processor=processor)
    policy = FirstToComplete(FakeClock())
    for turn in range(30):
        used.speed.observe_first(100, 0, 0, 0.3)
        used.speed.observe_between(turn % 3, 0, 0.030)
        assert picks(policy, [used, idle], 1) == ["used"]


def test_the_first_to_complete_depends_on_what_is_cached() -> None:
    a = make_replica("a", token_s=lambda beside: 0.01)
    b = make_replica("b", token_s=lambda beside: 0.015)
    policy, long = FirstToComplete(FakeClock()), load(prompt=2000, expected=20, known={"b": 1984})
    assert picks(policy, [a, b], 1, load(prompt=2000, expected=20)) == ["a"]
    assert picks(policy, [a, b], 1, long) == ["b"]
    b.cache_share = 0.01  # it has forgotten by the time that it is asked again
    assert picks(policy, [a, b], 1, long) == ["a"]


def test_predicted_times_are_those_learned() -> None:
    replica = make_replica("a", running=2, token_s=lambda b: 0.01 + 0.002 * b, first_s=lambda n, b: 0.1 + 1e-3 * n)
    took_s = FirstToComplete.completion_s(replica, load(prompt=500, expected=100))
    assert took_s == pytest.approx(0.1 + 0.5 + 100 * 0.014, rel=0.02)


def test_an_engine_of_which_nothing_is_known_is_tried_once_at_a_time() -> None:
    known, unknown = make_replica("known", token_s=lambda beside: 0.01), make_replica("unknown")
    policy = FirstToComplete(FakeClock())
    assert picks(policy, [known, unknown], 1) == ["unknown"]
    unknown.num_running = 1
    assert picks(policy, [known, unknown], 1) == ["known"]
    another = make_replica("another", running=2)
    assert picks(policy, [unknown, another], 1) == ["unknown"]  # nothing is known of any


def test_an_engine_that_was_not_used_for_long_is_tried_again() -> None:
    clock = FakeClock()
    best = make_replica("best", token_s=lambda beside: 0.010, clock=clock)
    near = make_replica("near", token_s=lambda beside: 0.0115, clock=clock)
    far = make_replica("far", token_s=lambda beside: 0.050, clock=clock)
    policy, replicas = FirstToComplete(clock), [far, best, near]
    assert picks(policy, replicas, 1) == ["best"]
    clock.now_s += 301
    best.last_used_s = clock.now_s
    assert picks(policy, replicas, 1) == ["near"]
    near.num_running = 1  # it is being tried
    assert picks(policy, replicas, 1) == ["best"]
    near.num_running, near.last_used_s = 0, clock.now_s
    assert picks(policy, replicas, 1) == ["best"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", FirstToComplete),
        ("round_robin", RoundRobin),
        ("weighted_round_robin", WeightedRoundRobin),
        ("least_connections", LeastConnections),
        ("resource_aware", ResourceAware),
    ],
)
def test_settings_name_a_policy(name: PolicyName, kind: type) -> None:
    assert type(make_policy(DispatchConfig(policy=name, prefix_affinity=False), FakeMeter({}))) is kind
    with_affinity = make_policy(DispatchConfig(policy=name), FakeMeter({}))
    assert type(with_affinity) is (FirstToComplete if name == "auto" else PrefixAffinity)
