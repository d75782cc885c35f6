"""The automatic choice of an engine against each engine alone, on a mixed load.

    python benchmarks/auto_choice.py [--engines native,vllm,deepspeed] [--runs 3] [--seconds 8]

Serves the demo model (made first if it is not there) with several engines, in bfloat16 but for native's own format.
The load is the same for all: short chats, long prompts with short answers, and bulk with long answers, arriving at
random (Poisson) at a rate of 30 % of what the fastest engine takes alone: with more, a moment in which the machine
was slow decides, by the queue that it leaves. Engines that cannot take that rate are there for `auto` only. Engines
are chosen by name, in turn with `auto`, in an order that changes; one that took twice as long as the best in the
first turns, in which `auto` learns what engines cost each other, has no more of its own. Prints mean completion
times, their ratio, `auto` to the best single engine, and the median of that ratio over the turns of a run. The exit
status is 1 if the median of all turns is over 1.03.
"""

import argparse
import asyncio
import random
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
from client import BFLOAT16, SMALL, Answer, all_ready, engine_names, prompts, serving, session, stream

from localmoe.bench.machine import cpu_name
from localmoe.catalog.catalog import DEMO_NAME

LOAD_SHARE = 0.3
MAX_LOAD_SHARE = 0.9
"""Of what an engine takes alone; one that is closer to being overrun has no turns."""
FAR_BEHIND = 2.0
"""Times as long as the best took, in the turn in which `auto` learns."""
BLOCKS = 12
"""Of a run: in each every engine has its turn, since the machine itself is slower in one minute than in the next."""
LEAST_TOLERANCE = 1.03


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of request."""

    name: str
    share: float
    prompt_words: int
    max_tokens: int


KINDS = (
    Kind(name="chat", share=0.6, prompt_words=8, max_tokens=24),
    Kind(name="long prompt", share=0.25, prompt_words=600, max_tokens=8),
    Kind(name="bulk", share=0.15, prompt_words=20, max_tokens=96),
)
WORDS = ("river", "stone", "lamp", "garden", "cloud", "paper", "violin", "bridge", "copper", "winter", "engine")


def requests(count: int, seed: int, turn: str) -> list[dict[str, object]]:
    """Bodies, the same for every turn but for how they begin: no two begin alike, so that no cache decides."""
    rng, beginnings = random.Random(seed), random.Random(f"{seed} {turn}")
    bodies = []
    for index in range(count):
        kind = rng.choices(KINDS, [kind.share for kind in KINDS])[0]
        words = " ".join(
            [str(beginnings.random()), *rng.choices(WORDS, k=kind.prompt_words), prompts(64)[index % 64]]
        )
        bodies.append({"model": DEMO_NAME, "prompt": words, "max_tokens": kind.max_tokens, "ignore_eos": True})
    return [{**body, "temperature": 0} for body in bodies]


async def run(
    client: aiohttp.ClientSession, url: str, engine: str, bodies: Sequence[dict[str, object]], rate: float
) -> list[Answer]:
    """Open loop: requests come when they come."""
    rng, answers, tasks = random.Random(len(bodies)), [Answer() for _ in bodies], []
    for body, answer in zip(bodies, answers, strict=True):
        headers = {"x-localmoe-engine": engine}
        tasks.append(asyncio.create_task(stream(client, url, body, answer, headers)))
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*tasks)
    failures = [answer.error for answer in answers if answer.error]
    if failures:
        raise SystemExit(f"error: {len(failures)} requests to {engine} failed: {failures[0]}")
    return answers


async def capacity(client: aiohttp.ClientSession, url: str, engine: str) -> float:
    """Requests a second that an engine completes when it has plenty."""
    bodies = requests(16, 7, engine)
    answers = await run(client, url, engine, bodies, rate=1e6)
    return len(bodies) / (max(a.ended_s for a in answers) - min(a.began_s for a in answers))


async def _answered(client: aiohttp.ClientSession, url: str) -> Counter[str]:
    """Complete answers so far, by engine."""
    async with client.get(f"{url}/metrics") as response:
        found = re.findall(r'answers_total{engine="([^"]+)".*outcome="complete"} (\d+)', await response.text())
    return Counter({engine: int(count) for engine, count in found})


async def measure(url: str, kinds: Sequence[str], arguments: argparse.Namespace) -> bool:
    ratios = []
    async with session() as client:
        names = engine_names(kinds)
        await all_ready(client, url, names)
        speeds = {name: await capacity(client, url, name) for name in names}
        rate = LOAD_SHARE * max(speeds.values())
        print(
            "alone: " + ", ".join(f"{name} {speed:.2f} requests/s" for name, speed in speeds.items()), flush=True
        )
        able = shown = [name for name in names if rate < MAX_LOAD_SHARE * speeds[name]]
        count = max(8, int(arguments.seconds * rate))
        print(
            "| run | "
            + " | ".join([*able, "auto", "ratio of means", "median of ratios"])
            + " | auto chose |\n"
            + "|---" * (len(able) + 5)
            + "|"
        )
        for number in range(arguments.runs + 1):
            is_learning = number == 0
            took_s: dict[str, list[float]] = {name: [] for name in [*able, "auto"]}
            """Mean completion times, one for each block."""
            chosen: Counter[str] = Counter()
            for block in range(1 if is_learning else BLOCKS):
                for engine in list(took_s)[:: -1 if block % 2 else 1]:
                    before = await _answered(client, url)
                    bodies = requests(count, 1000 * number + block, engine)
                    answers = await run(client, url, engine, bodies, rate)
                    took_s[engine].append(statistics.mean(answer.took_s for answer in answers))
                    if engine == "auto":
                        chosen += await _answered(client, url) - before
            mean_s = {name: statistics.mean(times) for name, times in took_s.items()}
            best = min(able, key=lambda name: mean_s[name])
            of_turns = [a / b for a, b in zip(took_s["auto"], took_s[best], strict=True)]
            row = [f"{mean_s[name]:.2f} s" if name in mean_s else "" for name in [*shown, "auto"]]
            row += [f"{mean_s['auto'] / mean_s[best]:.3f}", f"{statistics.median(of_turns):.3f}"]
            shares = ", ".join(f"{name} {num_answers}" for name, num_answers in chosen.items())
            label = "learning" if is_learning else number
            print(f"| {label} | " + " | ".join([*row, shares]) + " |", flush=True)
            if is_learning:
                able = [name for name in able if mean_s[name] < FAR_BEHIND * mean_s[best]]
            else:
                ratios += of_turns
    print(f"median of auto / best: {statistics.median(ratios):.3f}, {cpu_name()}")
    return statistics.median(ratios) <= LEAST_TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="native,vllm,deepspeed")
    parser.add_argument("--runs", default=3, type=int)
    parser.add_argument("--seconds", default=8.0, type=float)
    arguments = parser.parse_args()
    kinds = arguments.engines.split(",")
    with serving(kinds, SMALL | BFLOAT16) as (url, _):
        sys.exit(0 if asyncio.run(measure(url, kinds, arguments)) else 1)


if __name__ == "__main__":
    main()
