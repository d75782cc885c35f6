"""`bench cache`: the replay against caches written out plainly, the optimum against all there is, and the musts."""

import json
from collections import OrderedDict
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from localmoe.bench.cache import belady_hits, measure_cache, policy_hits
from localmoe.cli.main import app
from localmoe.core.errors import ConfigError, TraceError
from localmoe.residency.policy import Lru, PolicyName, retention_policy
from localmoe.residency.trace import RoutingTrace, read_trace
from support.traces import SHARED_TRACES, make_trace, random_trace, shared_trace

BUDGETS = (0.05, 0.1, 0.2, 0.35)


def best_hits_by_trying_all(trace: RoutingTrace, num_slots: int) -> int:
    """Hits of the best of all caches: every set of experts that could be kept after each use is followed up."""
    best: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for use in trace.uses:
        used = {(use.layer, int(expert)) for expert in use.experts.flat}
        reached: dict[frozenset[tuple[int, int]], int] = {}
        for kept, hits in best.items():
            after = hits if use.is_prompt else hits + len(kept & used)
            for size in range(num_slots + 1):
                for choice in combinations(sorted(kept | used), size):
                    key = frozenset(choice)
                    reached[key] = max(after, reached.get(key, 0))
        best = reached
    return max(best.values())


def lru_hits(trace: RoutingTrace, num_slots: int) -> int:
    kept: OrderedDict[tuple[int, int], None] = OrderedDict()
    num_hits = 0
    for use in trace.uses:
        experts = [(use.layer, int(expert)) for expert in use.experts.flat]
        if not use.is_prompt:
            num_hits += sum(expert in kept for expert in experts)
        for expert in experts:
            kept[expert] = None
            kept.move_to_end(expert)
            if len(kept) > num_slots:
                kept.popitem(last=False)
    return num_hits


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_belady_is_the_best_of_all_caches(seed: int, num_slots: int) -> None:
    trace = random_trace(seed)
    assert belady_hits(trace, num_slots) == best_hits_by_trying_all(trace, num_slots)


@pytest.mark.parametrize("num_slots", [1, 3, 7, 20, 48])
def test_lru_is_the_plain_one(num_slots: int) -> None:
    trace = random_trace(0, num_layers=4, num_experts=12, num_used=3, num_steps=60)
    assert policy_hits(trace, Lru(4, 12), num_slots) == lru_hits(trace, num_slots)


@pytest.mark.parametrize("name", SHARED_TRACES)
def test_lru_is_the_plain_one_on_a_recorded_trace(name: str) -> None:
    trace = read_trace(shared_trace(name))
    num_slots = trace.num_layers * trace.num_experts // 10
    policy = Lru(trace.num_layers, trace.num_experts)
    assert policy_hits(trace, policy, num_slots) == lru_hits(trace, num_slots)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_layers=st.integers(1, 4),
    num_used=st.integers(1, 4),
    num_slots=st.integers(1, 30),
    name=st.sampled_from(["lru", "lfu", "adaptive"]),
)
def test_no_policy_beats_belady(
    seed: int, num_layers: int, num_used: int, num_slots: int, name: PolicyName
) -> None:
    trace = random_trace(seed, num_layers=num_layers, num_experts=8, num_used=num_used, num_steps=30)
    hits = policy_hits(trace, retention_policy(name, num_layers, 8), num_slots)
    assert hits <= belady_hits(trace, num_slots)


def test_hits_of_a_cache_that_holds_all() -> None:
    trace = make_trace(1, 4, [(0, [[0], [1]], True), (0, [[1]], False), (0, [[2]], False), (0, [[2]], False)])
    report = measure_cache(trace, 1.0)
    assert (report.num_slots, report.num_uses) == (4, 3)
    assert report.lru == report.lfu == report.ours == report.belady == pytest.approx(2 / 3)
    assert report.gap_closed is None


def test_an_expert_not_worth_keeping_is_dropped() -> None:
    # One slot: every other token uses expert 0, and each other expert is used once. LRU keeps the last, in vain.
    uses = [(0, [[0 if step % 2 == 0 else step]], False) for step in range(20)]
    trace = make_trace(1, 20, uses)
    report = measure_cache(trace, 0.05)
    assert report.num_slots == 1
    assert report.lru == 0
    assert report.belady == pytest.approx(9 / 20)
    assert report.ours >= 5 / 20


def test_gap_closed_on_recorded_traces() -> None:
    """The must: 27 % on average over both traces and four budgets, and better than LRU everywhere."""
    closed = []
    for name in SHARED_TRACES:
        trace = read_trace(shared_trace(name))
        for budget in BUDGETS:
            report = measure_cache(trace, budget)
            assert report.ours > max(report.lru, report.lfu)
            assert report.gap_closed is not None
            closed.append(report.gap_closed)
    assert sum(closed) / len(closed) >= 0.27


def test_a_budget_that_holds_nothing() -> None:
    with pytest.raises(ConfigError, match="holds none"):
        measure_cache(random_trace(0), 0.1)


def write_small_trace(path: Path) -> Path:
    lines = [
        "# trace v1",
        "# model=small n_layer=2 n_expert=4 n_expert_used=1",
        "turn,phase,step,layer,slot,expert",
    ]
    lines += [f"0,{int(step > 0)},{step},{layer},0,{step % 3}" for step in range(9) for layer in range(2)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_command_prints_a_line_of_json_for_each_budget(tmp_path: Path) -> None:
    trace = str(write_small_trace(tmp_path / "a.csv"))
    arguments = ["bench", "cache", "--trace", trace, "--budget-fraction", "0.5, 1", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    half, whole = (json.loads(line) for line in result.stdout.splitlines())
    assert (half["num_slots"], whole["num_slots"]) == (4, 8)
    assert half.keys() >= {"lru", "lfu", "ours", "belady", "gap_closed"}
    assert whole["belady"] == whole["lru"] == pytest.approx(12 / 16)
    assert whole["gap_closed"] is None


def test_command_prints_a_table(tmp_path: Path) -> None:
    trace = str(write_small_trace(tmp_path / "a.csv"))
    arguments = ["bench", "cache", "--trace", trace, "--budget-fraction", "0.5,1"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "small: 16 uses" in result.stdout
    assert "75.0%" in result.stdout


@pytest.mark.parametrize("budget", ["0", "1.5", "-0.1", "nan", "inf", "5%", "", "0.1,,0.2", "1e-3", "²"])
def test_command_refuses_a_share_that_is_none(tmp_path: Path, budget: str) -> None:
    trace = str(write_small_trace(tmp_path / "a.csv"))
    result = CliRunner().invoke(app, ["bench", "cache", "--trace", trace, f"--budget-fraction={budget}"])
    assert result.exit_code == 2
    assert "--budget-fraction" in result.output


def test_command_names_what_is_wrong_with_a_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.csv: cannot be read: No such file"):
        CliRunner().invoke(
            app, ["bench", "cache", "--trace", str(tmp_path / "nowhere.csv")], catch_exceptions=False
        )
