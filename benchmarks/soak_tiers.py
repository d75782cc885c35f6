"""A server whose model does not fit in memory, under a limit, with streams that never end, for minutes.

    sudo python benchmarks/soak_tiers.py [--limit-mib 2048] [--streams 8] [--minutes 10]

Serves a store of random weights as `localmoe bench engine` makes it, the whole server in a control group with a
memory limit (root is needed). Each stream asks for answer after answer. Every half minute prints tokens generated
and what the group takes, without pages of files; at the end whether memory grew and the limit was held. The exit
status is 1 if a request failed, if nothing came of a stream for a minute, or if the second half took more memory
than the first.
"""

import argparse
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from peers.limits import forget_pages, memory_group, memory_taken_bytes
from peers.process import say
from served import Answer, make_home, server, stream

from localmoe.bench.shapes import SHAPES, find_model
from localmoe.bench.weights import ensure_store
from localmoe.catalog.catalog import Catalog
from localmoe.catalog.demo import build_demo
from localmoe.config.settings import load_settings
from localmoe.core.model import WeightFormat

ANSWER_TOKENS = 64
CONTEXT_TOKENS = 1024
"""Of the cache, which must hold one whole context beside the experts."""
SILENCE_S = 60.0
SAMPLE_S = 30.0
GROWTH = 1.02
"""Of memory from the first half to the second that is still noise."""


@dataclass
class Streams:
    """What the streams have done so far; each thread adds to it."""

    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    last_s: dict[int, float] = field(default_factory=dict)
    """When each stream last got an answer."""
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self, url: str, name: str, number: int) -> None:
        """Ask until told to end."""
        seed = number
        while not self.ended.is_set():
            answer = Answer()
            try:
                stream(url, name, seed, ANSWER_TOKENS, answer)
            except httpx2.HTTPError as error:
                self.failures.append(f"stream {number}: {error}")
                return
            if answer.num_tokens != ANSWER_TOKENS:
                self.failures.append(f"stream {number}: an answer ended after {answer.num_tokens} tokens")
                return
            self.num_tokens += answer.num_tokens
            self.last_s[number] = time.monotonic()
            seed += 1000


def soak(url: str, name: str, group: Path, num_streams: int, minutes: float) -> tuple[list[int], list[str]]:
    """Memory of the group [bytes] at each sample, and what went wrong."""
    streams = Streams(last_s=dict.fromkeys(range(num_streams), time.monotonic()))
    threads = [threading.Thread(target=streams.run, args=(url, name, number)) for number in range(num_streams)]
    for thread in threads:
        thread.start()
    started_s, taken = time.monotonic(), []
    while time.monotonic() - started_s < 60 * minutes and not streams.failures:
        time.sleep(SAMPLE_S)
        taken.append(memory_taken_bytes(group))
        elapsed_s = time.monotonic() - started_s
        say(f"{elapsed_s:.0f} s: {streams.num_tokens / elapsed_s:.2f} tok/s, {taken[-1] / 2**20:.0f} MiB")
        silent = [n for n, last_s in streams.last_s.items() if time.monotonic() - last_s > SILENCE_S]
        streams.failures += [f"stream {number}: silent for {SILENCE_S:.0f} s" for number in silent]
    streams.ended.set()
    for thread in threads:
        thread.join(SILENCE_S)
    return taken, streams.failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="olmoe-1b-7b", choices=SHAPES)
    parser.add_argument("--limit-mib", default=2048, type=int)
    parser.add_argument("--streams", default=8, type=int)
    parser.add_argument("--minutes", default=10.0, type=float)
    arguments = parser.parse_args()
    name, weights, home = arguments.shape, WeightFormat.MXFP4, load_settings().home
    tokenizer = build_demo(Catalog(home), gguf=None, on_progress=lambda *_: None) / "tokenizer.json"
    store = ensure_store(find_model(name), weights, home, lambda *_: None)
    limit_bytes = arguments.limit_mib << 20
    with tempfile.TemporaryDirectory() as directory, memory_group(limit_bytes) as inside:
        make_home(Path(directory), name, weights, store, tokenizer)
        forget_pages(store)
        group = Path(inside[-1]).parent
        context = {"LOCALMOE_ENGINE__MAX_CONTEXT_TOKENS": str(CONTEXT_TOKENS)}
        with server(Path(directory), name, weights, inside, **context) as (url, _):
            taken, failures = soak(url, name, group, arguments.streams, arguments.minutes)
    half = len(taken) // 2
    if half and max(taken[half:]) > GROWTH * max(taken[:half]):
        failures.append(f"memory grew from {max(taken[:half])} to {max(taken[half:])} bytes")
    if max(taken, default=0) > limit_bytes:
        failures.append(f"{max(taken)} bytes were taken, the limit is {limit_bytes}")
    for failure in failures:
        print(f"error: {failure}")
    print(
        f"{arguments.streams} streams, {len(taken) * SAMPLE_S / 60:.1f} minutes, {arguments.limit_mib} MiB: ",
        end="",
    )
    print(f"at most {max(taken, default=0) / 2**20:.0f} MiB, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
