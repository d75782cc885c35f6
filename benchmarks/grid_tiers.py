"""The automatic choices of the tiers against every other choice: policy, layers read ahead, queue depth.

Each run of `localmoe bench tiers` is alone in a control group with a memory limit (root is needed). A machine's
speed drifts over such a time, so a run with nothing chosen stands between any few others, and each is compared with
the mean of the two around it. Prints Markdown, progress on standard error.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from peers.limits import forget_pages, memory_group
from peers.process import OtherWork, PeerError, json_lines, run, say

from localmoe.bench.machine import cpu_name
from localmoe.bench.shapes import SHAPES

POLICIES = ("lru", "lfu", "adaptive")
LAYERS_AHEAD = (0, 1, 2)
QUEUE_DEPTHS = (4, 8, 16, 32)
RUNS_BETWEEN = 3
"""Between two with nothing chosen."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--home", type=Path, required=True, help="where the store is, or is written; kept for later"
    )
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--limits-mib", default="2048,3072", help="memory of each command (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--best", type=int, default=3, help="so many of the best are measured again (default: 3)")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    args = parser.parse_args(argv)
    bench = _Bench(args.home.resolve(), args.shape, args.threads)
    figures: dict[str, dict[str, list[float]]] = {}
    other = OtherWork()
    try:
        bench.write_store()
        for limit_mib in map(int, args.limits_mib.split(",")):
            grid = [*itertools.product(POLICIES, LAYERS_AHEAD, QUEUE_DEPTHS)]
            found = bench.against_auto(limit_mib, grid)
            # The best of many noisy runs flatters itself; measured again, it does not.
            best = sorted(found, key=lambda choice: found[choice][0])[: args.best]
            for _ in range(2):
                for choice, ratios in bench.against_auto(limit_mib, best).items():
                    found[choice] += ratios
            figures[str(limit_mib)] = {" ".join(map(str, choice)): ratios for choice, ratios in found.items()}
    except PeerError as error:
        say(str(error))
        return 1
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {args.threads} threads, {args.shape}, MXFP4.\n")
    print(_markdown(figures))
    if (busy := other.cores()) > 0.1:
        print(f"\nNot valid, the machine was not quiet: other programs used {busy:.1f} cores.")
    return 0


Choice = tuple[str, int, int]
"""Policy, layers read ahead, queue depth."""


class _Bench:
    """Runs of `localmoe bench tiers`."""

    def __init__(self, home: Path, shape: str, threads: int) -> None:
        self._home = home
        self._store = home / "bench" / f"{shape}-mxfp4.store"
        self._command = [sys.executable, "-m", "localmoe", "bench", "tiers", "--json", "--shape", shape]
        self._command += ["--threads", str(threads), "--prompt-tokens", "64"]

    def write_store(self) -> None:
        """Outside every limit. Raises PeerError."""
        self._run([*self._command, "--ram-bytes", "2e9"])

    def against_auto(self, limit_mib: int, choices: Sequence[Choice]) -> dict[Choice, list[float]]:
        """Tokens decoded per second with nothing chosen, as a ratio to those with each choice. Raises PeerError."""
        ratios: dict[Choice, list[float]] = {}
        before = self._decode_tok_s(limit_mib, None)
        for first in range(0, len(choices), RUNS_BETWEEN):
            some = choices[first : first + RUNS_BETWEEN]
            found = [self._decode_tok_s(limit_mib, choice) for choice in some]
            after = self._decode_tok_s(limit_mib, None)
            auto = statistics.mean((before, after))
            ratios |= {choice: [auto / tok_s] for choice, tok_s in zip(some, found, strict=True)}
            before = after
        return ratios

    def _decode_tok_s(self, limit_mib: int, choice: Choice | None) -> float:
        options: list[str] = []
        if choice is not None:
            policy, layers, depth = choice
            options = ["--policy", policy, "--prefetch-layers", str(layers), "--queue-depth", str(depth)]
        with memory_group(limit_mib << 20) as inside:
            forget_pages(self._store)
            (report,) = json_lines(self._run([*inside, *self._command, *options]))
        tok_s = float(report["decode_tok_s"])
        say(f"{limit_mib} MiB, {' '.join(options) or 'auto'}: {tok_s:.2f} tok/s")
        return tok_s

    def _run(self, command: Sequence[str]) -> str:
        return run(command, self._home / "grid.log", variables={"LOCALMOE_HOME": str(self._home)})


def _markdown(figures: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| limit | best of the grid: policy, layers ahead, depth | auto / best | auto / worst |",
        "|---|---|---|---|",
    ]
    for limit, ratios in figures.items():
        medians = {choice: statistics.median(values) for choice, values in ratios.items()}
        # Only what was measured again is compared with.
        best = min((choice for choice in medians if len(ratios[choice]) > 1), key=medians.__getitem__)
        lines.append(f"| {limit} MiB | {best} | **{medians[best]:.2f}** | {max(medians.values()):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
