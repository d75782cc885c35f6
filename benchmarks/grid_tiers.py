"""The automatic choices of the tiers against every other choice: policy, layers read ahead, queue depth.

    python benchmarks/grid_tiers.py [--slots 369,690] [--shape olmoe-1b-7b] [--json FILE]

For each policy and number of layers ahead, decoders of every queue depth and one with nothing chosen are in memory
together, each with the same number of slots, and decode the same random tokens in turns of a few steps: so a moment
in which the machine is slower falls on all alike. Compared are medians over the turns. The best of so many noisy
figures is best by luck too, so those that looked best are then measured anew, longer, and only these figures count.
Takes about a quarter of an hour and 16 GB; a memory limit of 2 or 3 GiB leaves olmoe-1b-7b 369 or 690 slots. Prints
Markdown.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from peers.process import OtherWork, say

from localmoe.bench.engine import StepBench, Workload
from localmoe.bench.machine import cpu_name
from localmoe.bench.shapes import SHAPES, find_model
from localmoe.bench.weights import ensure_store
from localmoe.config.settings import load_settings
from localmoe.core.model import WeightFormat
from localmoe.engine.budget import MemoryPlan
from localmoe.engine.config import EngineConfig
from localmoe.engine.load import load_tiered
from localmoe.formats.store import Store
from localmoe.hardware.processors import num_processors
from localmoe.kernels.base import Kernels
from localmoe.kernels.select import select_kernels
from localmoe.residency.policy import PolicyName
from localmoe.tiers.config import TiersConfig
from localmoe.tiers.host import stride_bytes

LAYERS_AHEAD = (0, 1, 2)
QUEUE_DEPTHS = (4, 8, 16, 32)
PROMPT_TOKENS = 128
CONTEXT_TOKENS = 512
WARM_STEPS = 48
"""Until every slot has been read into: the first time takes longer."""
STEPS = 2
"""Of a turn."""
TURNS = 10
FINALISTS = 4
FINAL_TURNS = 96


class Grid:
    """Decoders of one store, with the same number of slots each."""

    def __init__(self, store: Store, kernels: Kernels, config: EngineConfig, num_slots: int) -> None:
        self._store = store
        self._kernels = kernels
        self._config = config
        self._plan = MemoryPlan(
            budget_bytes=1 << 40,
            kv_cache_bytes=0,
            workspace_bytes=0,
            dense_bytes=0,
            num_slots=num_slots,
            slot_bytes=stride_bytes(store.blob_bytes),
        )

    def against_auto(self, choices: Sequence[TiersConfig], num_turns: int) -> list[float]:
        """Speed with nothing chosen, as a ratio to the speed with each choice."""
        benches = [self._bench(choice) for choice in (self._config.tiers, *choices)]
        for bench in benches:
            bench.step(1, PROMPT_TOKENS, 0)
            for position in range(WARM_STEPS):
                bench.step(1, 1, position)
        turns_s: list[list[float]] = [[] for _ in benches]
        order = list(zip(benches, turns_s, strict=True))
        for turn in range(num_turns):
            random.Random(turn).shuffle(order)  # what goes before may matter
            for bench, times_s in order:
                first = WARM_STEPS + turn * STEPS
                times_s.append(sum(bench.step(1, 1, position)[0] for position in range(first, first + STEPS)))
        auto_s, *others_s = turns_s
        return [
            statistics.median(other / auto for other, auto in zip(times_s, auto_s, strict=True))
            for times_s in others_s
        ]

    def _bench(self, tiers: TiersConfig) -> StepBench:
        decoder, _ = load_tiered(self._store, self._kernels, self._plan, tiers)
        workload = Workload(streams=(1,), prompt_tokens=CONTEXT_TOKENS)
        return StepBench(decoder, self._kernels, self._store.weights, self._config, workload)


def search(grid: Grid, auto: TiersConfig) -> dict[str, dict[str, float]]:
    """Ratios by choice: of the whole grid, and of those that looked best."""
    ratios: dict[str, float] = {}
    choices: dict[str, TiersConfig] = {}
    for policy, ahead in itertools.product(get_args(PolicyName), LAYERS_AHEAD):
        tiers = replace(auto, policy=policy, prefetch_layers=ahead)
        group = {
            f"{policy}, {ahead}, {depth}": replace(tiers, disk=replace(tiers.disk, queue_depth=depth))
            for depth in QUEUE_DEPTHS
        }
        choices |= group
        ratios |= zip(group, grid.against_auto(list(group.values()), TURNS), strict=True)
        say("; ".join(f"{name}: {ratios[name]:.2f}" for name in group))
    finalists = sorted(ratios, key=ratios.__getitem__)[:FINALISTS]
    again = grid.against_auto([choices[name] for name in finalists], FINAL_TURNS)
    return {"grid": ratios, "finalists": dict(zip(finalists, again, strict=True))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="369,690", help="experts that fit in memory (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings, other = load_settings(), OtherWork()
    num_threads = settings.engine.num_threads or num_processors()
    kernels = select_kernels(settings.engine.cpu_level, num_threads, pin=settings.engine.pin_threads)
    config = replace(settings.engine, num_threads=num_threads, tiers=TiersConfig())
    path = ensure_store(find_model(args.shape), WeightFormat.MXFP4, settings.home, lambda *_: None)
    found: dict[str, dict[str, dict[str, float]]] = {}
    with Store.open(path) as store:
        for num_slots in map(int, args.slots.split(",")):
            found[str(num_slots)] = search(Grid(store, kernels, config, num_slots), config.tiers)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {num_threads} threads, {args.shape}, MXFP4.\n")
    print("| slots | best choice: policy, layers ahead, queue depth | auto / best | auto / worst |")
    print("|---|---|---|---|")
    for slots, ratios in found.items():
        finalists = ratios["finalists"]
        best = min(finalists, key=finalists.__getitem__)
        print(f"| {slots} | {best} | **{finalists[best]:.2f}** | {max(ratios['grid'].values()):.2f} |")
    if (busy := other.cores()) > 0.1:
        print(f"\nNot valid, the machine was not quiet: other programs used {busy:.1f} cores.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
