"""Ten times the requests that a server can answer, for a minute: who gets in, who is told to come again, and memory.

    python benchmarks/overload.py [--engines native,native] [--times 10] [--seconds 60] [--deadline 10]

Serves the demo model (made first if it is not there). First measures how many chats of 24 tokens it completes a
second, then sends so many times as many, at random, each with a deadline. Prints how many were accepted, how many of
those were complete in time, how long the others took to be refused, and the server's memory over time. The exit
status is 1 if an accepted request was not complete in time, a refusal took longer than a second (99th percentile) or
was none of 429 and 503, or memory grew by more than a tenth from the first third to the last.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from client import SMALL, Answer, all_ready, engine_names, prompts, serving, session, stream

from localmoe.catalog.catalog import DEMO_NAME

REFUSAL_S = 1.0
GROWTH = 1.1
MAX_TOKENS = 24


@dataclass
class Tally:
    """What came of all requests."""

    accepted: list[Answer] = field(default_factory=list)
    refused: list[Answer] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)


def resident_bytes(pid: int) -> int:
    """Of the gateway's process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def body(prompt: str, seed: int) -> dict[str, object]:
    messages = [{"role": "user", "content": f"{seed}: {prompt}"}]
    return {
        "model": DEMO_NAME,
        "messages": messages,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


async def capacity(client: aiohttp.ClientSession, url: str) -> float:
    """Requests a second when all places are taken."""
    answers = [Answer() for _ in range(128)]
    bodies = [body(prompt, index) for index, prompt in enumerate(prompts(128))]
    await asyncio.gather(*(stream(client, url, one, answer) for one, answer in zip(bodies, answers, strict=True)))
    return len(answers) / (max(a.ended_s for a in answers) - min(a.began_s for a in answers))


async def overload(
    client: aiohttp.ClientSession, url: str, pid: int, rate: float, arguments: argparse.Namespace
) -> Tally:
    rng, tally, tasks, end_s = random.Random(1), Tally(), set(), time.perf_counter() + arguments.seconds
    headers = {"x-localmoe-timeout-s": str(arguments.deadline)}
    answers, looked_s = [], 0.0
    while time.perf_counter() < end_s:
        answer = Answer()
        answers.append(answer)
        one = body(rng.choice(prompts(64)), len(answers))
        task = asyncio.create_task(stream(client, url, one, answer, headers))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(rng.expovariate(rate))
        if time.perf_counter() - looked_s > 1:
            looked_s = time.perf_counter()
            tally.memory_bytes.append(resident_bytes(pid))
    await asyncio.gather(*tasks)
    for answer in answers:
        (tally.accepted if answer.status == 200 else tally.refused).append(answer)
    return tally


def report(tally: Tally, deadline_s: float) -> bool:
    in_time = [a for a in tally.accepted if a.error is None and a.took_s <= deadline_s + 0.1]
    late = [answer for answer in tally.accepted if answer not in in_time]
    refusals_s = sorted(answer.took_s for answer in tally.refused)
    p99_s = refusals_s[int(0.99 * len(refusals_s))] if refusals_s else 0.0
    statuses = {answer.status for answer in tally.refused}
    third = max(1, len(tally.memory_bytes) // 3)
    first, last = (statistics.median(part) for part in (tally.memory_bytes[:third], tally.memory_bytes[-third:]))
    print(f"{len(tally.accepted)} accepted, of which {len(in_time)} were complete in {deadline_s:g} s")
    began_s = min(answer.began_s for answer in tally.accepted)
    for answer in late[:5]:
        print(f"  not: after {answer.began_s - began_s:.1f} s one took {answer.took_s:.1f} s: {answer.error}")
    median_s = statistics.median(refusals_s) if refusals_s else 0.0
    print(f"{len(tally.refused)} refused with {statuses}: median {median_s:.3f} s, p99 {p99_s:.3f} s")
    print(f"gateway's memory: {first / 2**20:.0f} MiB in the first third, {last / 2**20:.0f} MiB in the last")
    return not late and p99_s <= REFUSAL_S and statuses <= {429, 503} and last <= GROWTH * first


async def measure(url: str, pid: int, kinds: Sequence[str], arguments: argparse.Namespace) -> bool:
    async with session() as client:
        await all_ready(client, url, engine_names(kinds))
        await capacity(client, url)
        rate = await capacity(client, url)
        print(f"{rate:.1f} requests/s are its capacity; {arguments.times * rate:.0f} are sent", flush=True)
        tally = await overload(client, url, pid, arguments.times * rate, arguments)
    return report(tally, arguments.deadline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="native,native")
    parser.add_argument("--times", default=10.0, type=float)
    parser.add_argument("--seconds", default=60.0, type=float)
    parser.add_argument("--deadline", default=10.0, type=float)
    arguments = parser.parse_args()
    kinds = arguments.engines.split(",")
    with serving(kinds, SMALL) as (url, pid):
        sys.exit(0 if asyncio.run(measure(url, pid, kinds, arguments)) else 1)


if __name__ == "__main__":
    main()
