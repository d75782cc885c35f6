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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from localmoe.bench.machine import cpu_name, read_bandwidth_bytes_s
from localmoe.bench.shapes import SHAPES, find_model
from localmoe.bench.weights import ensure_store
from localmoe.catalog.catalog import Catalog
from localmoe.catalog.demo import build_demo
from localmoe.config.settings import load_settings
from localmoe.core.model import ModelShape, WeightFormat
from localmoe.engine.load import num_compute_threads
from localmoe.formats.packed import packed_bytes
from localmoe.formats.store_layout import dense_format, dense_shapes

PROMPT_TOKENS = 8
READY_LIMIT_S = 60.0


def token_bytes(shape: ModelShape, weights: WeightFormat) -> int:
    """Bytes of weights that one token alone must read."""
    expert = 2 * sum(packed_bytes(weights, shape.expert_size, shape.hidden_size))
    expert += sum(packed_bytes(weights, shape.hidden_size, shape.expert_size))
    dense = sum(
        sum(packed_bytes(dense_format(name, dimensions, weights), *dimensions))
        for name, dimensions in dense_shapes(shape).items()
        if len(dimensions) == 2 and (name != "embed" or shape.tie_embeddings)
    )
    return shape.num_layers * shape.top_k * expert + dense


def make_home(home: Path, name: str, weights: WeightFormat, store: Path, tokenizer: Path) -> None:
    """A catalog with this one model."""
    directory = home / "models" / name
    (directory / "stores").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[name]))
    (directory / "tokenizer.json").symlink_to(tokenizer)
    (directory / "stores" / f"{weights}.store").symlink_to(store)


@contextmanager
def server(home: Path, name: str, weights: WeightFormat) -> Iterator[tuple[str, float]]:
    """A running server's address, and the seconds it took to be ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "localmoe", "serve", name, "--weights", weights, "--port", str(port)],
        env=os.environ | {"LOCALMOE_HOME": str(home)},
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


def stream(url: str, name: str, seed: int, num_tokens: int, times_s: list[float]) -> None:
    """Generate, and note when each chunk with a token came."""
    prompt = random.Random(seed).choices(range(1000, 40000), k=PROMPT_TOKENS)
    body = {"model": name, "prompt": prompt, "max_tokens": num_tokens, "temperature": 1.0, "seed": seed}
    body |= {"stream": True, "ignore_eos": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times_s.append(time.perf_counter())  # noqa: PERF401 (the time is that of the line)


def measure(url: str, name: str, num_streams: int, num_tokens: int) -> float:
    """Tokens a second, from the last stream's first token until the first stream ends."""
    all_times_s: list[list[float]] = [[] for _ in range(num_streams)]
    threads = [
        threading.Thread(target=stream, args=(url, name, seed, num_tokens, times_s))
        for seed, times_s in enumerate(all_times_s)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    start_s, end_s = max(times[0] for times in all_times_s), min(times[-1] for times in all_times_s)
    return sum(start_s < at <= end_s for times in all_times_s for at in times) / (end_s - start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="olmoe-1b-7b", choices=SHAPES)
    parser.add_argument("--format", default="mxfp4", type=WeightFormat)
    parser.add_argument("--streams", default="1,8,16")
    parser.add_argument("--tokens", default=128, type=int)
    arguments = parser.parse_args()
    name, weights = arguments.shape, arguments.format

    home = load_settings().home
    model = find_model(name)
    tokenizer = build_demo(Catalog(home), gguf=None, on_progress=lambda *_: None) / "tokenizer.json"
    store = ensure_store(model, weights, home, lambda *_: None)
    bandwidth = read_bandwidth_bytes_s(num_compute_threads(load_settings().engine))
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
            for num_streams in map(int, arguments.streams.split(",")):
                speed = statistics.median(measure(url, name, num_streams, arguments.tokens) for _ in range(3))
                share = f", {speed * token_bytes(model.shape, weights) / bandwidth:.0%} of the read roof"
                print(f"| {num_streams} streams | {speed:.1f} tok/s{share if num_streams == 1 else ''} |")


if __name__ == "__main__":
    main()
