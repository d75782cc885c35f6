"""Engines killed in mid-stream: whether any client notices.

    python benchmarks/failover.py [--engines native,native] [--streams 64] [--rounds 20] [--tokens 48]

Serves the demo model (made first if it is not there) with two engines and sends greedy streams, shared out evenly. In
each round the first engine is killed (SIGKILL) when a third of all tokens have come. An answer is right if it has all
its tokens, each once, and, between native engines, the text of a run in which nobody was killed. Prints failed and
wrong answers and what the break cost: the longest silence of each stream that was taken over. The exit status is 1 if
an answer failed or was wrong.

With `--engines native,vllm` (`localmoe engines install vllm` first) both compute in float32; then texts may differ
after the break, because two ways to round differ, and the share of equal ones is printed.
"""

import argparse
import asyncio
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from client import FLOAT32, SMALL, Answer, all_ready, engine_names, metric, prompts, serving, session, stream

from localmoe.catalog.catalog import DEMO_NAME

SETTINGS = SMALL | {
    # Even shares, so that every engine has answers to lose.
    "LOCALMOE_DISPATCH__POLICY": "round_robin",
    "LOCALMOE_DISPATCH__PREFIX_AFFINITY": "false",
    "LOCALMOE_VLLM__ENFORCE_EAGER": "true",
}


async def run_round(
    client: aiohttp.ClientSession, url: str, count: int, num_tokens: int, victim: int | None
) -> list[Answer]:
    """All streams at once; the victim is killed when a third of all tokens have come."""
    answers = [Answer() for _ in range(count)]
    body = {"model": DEMO_NAME, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    tasks = [
        asyncio.create_task(stream(client, url, {**body, "prompt": prompt}, answer))
        for prompt, answer in zip(prompts(count), answers, strict=True)
    ]
    while victim is not None and not all(task.done() for task in tasks):
        await asyncio.sleep(0.01)
        if sum(answer.num_tokens for answer in answers) >= count * num_tokens / 3:
            os.kill(victim, signal.SIGKILL)
            break
    await asyncio.gather(*tasks)
    return answers


def native_pid(server_pid: int) -> int | None:
    """A native engine of a server; of several, the oldest."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == server_pid and b"localmoe.engine.process" in command:
            found.append(int(path.parent.name))
    return min(found, default=None)


async def measure(url: str, server_pid: int, arguments: argparse.Namespace, kinds: Sequence[str]) -> bool:
    count, num_tokens, names = arguments.streams, arguments.tokens, engine_names(kinds)
    failed = wrong = differing = 0
    silences_s: list[float] = []
    async with session() as client:
        await all_ready(client, url, names)
        reference = await run_round(client, url, count, num_tokens, None)
        for number in range(arguments.rounds):
            await all_ready(client, url, names)
            before = await metric(client, url, "localmoe_streams_resumed_total")
            answers = await run_round(client, url, count, num_tokens, native_pid(server_pid))
            num_resumed = int(await metric(client, url, "localmoe_streams_resumed_total") - before)
            errors = [answer.error for answer in answers if answer.error]
            whole = [(a, b) for a, b in zip(answers, reference, strict=True) if not a.error]
            failed += len(errors)
            wrong += sum(answer.num_tokens != num_tokens for answer, _ in whole)
            differing += sum(answer.text != undisturbed.text for answer, undisturbed in whole)
            longest_s = sorted((answer.silence_s for answer in answers), reverse=True)
            silences_s += longest_s[:num_resumed]
            print(
                f"round {number + 1}: {num_resumed} taken over, {len(errors)} failed {errors[:1] or ''}",
                flush=True,
            )
    if len(silences_s) < 2:
        print("error: nothing was taken over")
        return False
    usual_s = statistics.median(answer.silence_s for answer in reference)
    p95_s = statistics.quantiles(silences_s, n=20)[-1]
    print(f"{arguments.rounds * count} answers of {num_tokens} tokens, {len(silences_s)} taken over")
    print(f"failed {failed}; with tokens lost or repeated {wrong}; with another text than undisturbed {differing}")
    print(f"longest silence of those taken over: median {statistics.median(silences_s):.2f} s, p95 {p95_s:.2f} s")
    print(
        f"longest silence where nobody dies: median {usual_s:.2f} s; a break costs {p95_s - usual_s:.2f} s at p95"
    )
    return not failed and not wrong and not (set(kinds) == {"native"} and differing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="native,native")
    parser.add_argument("--streams", default=64, type=int)
    parser.add_argument("--rounds", default=20, type=int)
    parser.add_argument("--tokens", default=48, type=int)
    arguments = parser.parse_args()
    kinds = arguments.engines.split(",")
    settings, weights = (SETTINGS, "nvfp4") if set(kinds) == {"native"} else (SETTINGS | FLOAT32, "f32")
    with serving(kinds, settings, weights=weights) as (url, pid):
        sys.exit(0 if asyncio.run(measure(url, pid, arguments, kinds)) else 1)


if __name__ == "__main__":
    main()
