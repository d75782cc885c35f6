"""What is left of the engine's speed once it is served over HTTP, and how soon a server is ready.

    python benchmarks/served.py [--shape olmoe-1b-7b] [--format mxfp4] [--streams 1,8,16] [--tokens 128]

Serves a store of random weights as `localmoe bench engine` makes it, with the demo model's tokenizer (made first if
it is not there). Streams generate at temperature 1, so that random weights do not repeat themselves, from random
prompts of 8 tokens. Prints a Markdown table: tokens a second while all streams run, and for one stream its bytes by
the second as a share of the read bandwidth that is measured before; and the time from exec to `/health/ready`, best
of three with the store in the page cache.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from localmoe.bench.engine import step_bytes
from localmoe.bench.machine import cpu_name, read_bandwidth_bytes_s
from localmoe.bench.shapes import SHAPES, find_model
from localmoe.bench.weights import ensure_store
from localmoe.catalog.catalog import Catalog
from localmoe.catalog.demo import build_demo
from localmoe.config.settings import load_settings
from localmoe.core.model import ModelShape, WeightFormat
from localmoe.hardware.processors import num_processors

PROMPT_TOKENS = 8
READY_LIMIT_S = 60.0
KV_DTYPE = "bf16"


def token_bytes(shape: ModelShape, weights: WeightFormat, num_tokens: int) -> int:
    """Bytes of a step of one stream, halfway through its answer."""
    context_tokens = PROMPT_TOKENS + num_tokens // 2
    return step_bytes(shape, weights, shape.num_layers * shape.top_k, 1, context_tokens, KV_DTYPE)


def make_home(home: Path, name: str, weights: WeightFormat, store: Path, tokenizer: Path) -> None:
    """A catalog with this one model."""
    directory = home / "models" / name
    (directory / "stores").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[name]))
    (directory / "tokenizer.json").symlink_to(tokenizer)
    (directory / "stores" / f"{weights}.store").symlink_to(store)


@contextmanager
def server(
    home: Path, name: str, weights: WeightFormat, inside: Sequence[str] = (), **settings: str
) -> Iterator[tuple[str, float]]:
    """A running server's address, and the seconds it took to be ready.

    Args:
        inside: words that start a command in a control group.
        settings: as environment variables.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started_s = time.perf_counter()
    process = subprocess.Popen(
        [*inside, sys.executable, "-m", "localmoe", "serve", name, "--weights", weights, "--port", str(port)],
        env=os.environ
        | {
            "LOCALMOE_HOME": str(home),
            "LOCALMOE_ENGINE__SPECULATION": "false",
            "LOCALMOE_ENGINE__KV_CACHE_DTYPE": KV_DTYPE,
        }
        | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                if httpx2.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            if process.poll() is not None or time.perf_counter() - started_s > READY_LIMIT_S:
                raise SystemExit(f"error: the server did not get ready: localmoe serve {name} --weights {weights}")
            time.sleep(0.01)
        yield url, time.perf_counter() - started_s
    finally:
        process.terminate()
        process.wait()


@dataclass
class Answer:
    """What came of one stream."""

    times_s: list[float] = field(default_factory=list)
    """When each piece of text came."""
    num_tokens: int = 0
    """By the server's count: some tokens send nothing, as the first ones of a character."""


def stream(url: str, name: str, seed: int, num_tokens: int, answer: Answer) -> None:
    """Generate, and note what comes."""
    prompt = random.Random(seed).choices(range(1000, 40000), k=PROMPT_TOKENS)
    body = {"model": name, "prompt": prompt, "max_tokens": num_tokens, "temperature": 1.0, "seed": seed}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
        lines = [(time.perf_counter(), line) for line in response.iter_lines()]
    # Read afterwards: while streams run, the server needs the processor.
    for at_s, line in lines:
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            if any(choice["text"] for choice in chunk["choices"]):
                answer.times_s.append(at_s)
            if chunk["usage"]:
                answer.num_tokens = chunk["usage"]["completion_tokens"]


def measure(url: str, name: str, num_streams: int, num_tokens: int) -> float:
    """Tokens a second, from the last stream's first text until the first stream ends."""
    answers = [Answer() for _ in range(num_streams)]
    threads = [
        threading.Thread(target=stream, args=(url, name, seed, num_tokens, answer))
        for seed, answer in enumerate(answers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(answer.times_s and answer.num_tokens == num_tokens for answer in answers):
        raise SystemExit(f"error: a stream ended before its {num_tokens} tokens")
    start_s, end_s = max(a.times_s[0] for a in answers), min(a.times_s[-1] for a in answers)
    # Each piece of text stands for as many tokens as its stream's pieces do on average.
    counted = [sum(start_s < at_s <= end_s for at_s in a.times_s) / len(a.times_s) for a in answers]
    return num_tokens * sum(counted) / (end_s - start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="olmoe-1b-7b", choices=SHAPES)
    parser.add_argument("--format", default="mxfp4", type=WeightFormat)
    parser.add_argument("--streams", default="1,8,16")
    parser.add_argument("--tokens", default=128, type=int)
    arguments = parser.parse_args()
    name, weights = arguments.shape, arguments.format

    settings = load_settings()
    home, num_threads = settings.home, settings.engine.num_threads or num_processors()
    model = find_model(name)
    tokenizer = build_demo(Catalog(home), gguf=None, on_progress=lambda *_: None) / "tokenizer.json"
    store = ensure_store(model, weights, home, lambda *_: None)
    bandwidth = read_bandwidth_bytes_s(num_threads)
    print(f"{cpu_name()}, {name} {weights}, read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print("| measure | figure |\n|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        make_home(Path(directory), name, weights, store, tokenizer)
        ready_s = []
        for _ in range(3):
            with server(Path(directory), name, weights) as (_, seconds):
                ready_s.append(seconds)
        print(f"| exec to ready, {store.stat().st_size / 1e9:.1f} GB store | {min(ready_s):.2f} s |")
        with server(Path(directory), name, weights) as (url, _):
            bytes_per_token = token_bytes(model.shape, weights, arguments.tokens)
            for num_streams in map(int, arguments.streams.split(",")):
                speed = statistics.median(measure(url, name, num_streams, arguments.tokens) for _ in range(3))
                share = f", {speed * bytes_per_token / bandwidth:.0%} of the read roof"
                print(f"| {num_streams} streams | {speed:.1f} tok/s{share if num_streams == 1 else ''} |")


if __name__ == "__main__":
    main()
