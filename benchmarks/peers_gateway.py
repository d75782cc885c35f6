"""LocalMoE's gateway against LiteLLM's proxy: the same scripted server behind both, the same client before them.

    python benchmarks/peers_gateway.py --workdir ~/peers [--concurrency 64] [--rounds 3]

Installs LiteLLM into an environment of its own below the working directory. Server, gateway and client are processes
of their own; each gateway has one process. All rounds measure the server itself, LocalMoE and LiteLLM in turn: what
each stream event is delayed by, and what the first one is. Prints medians of the rounds and the ratio of the delays
that are added, as Markdown. The exit status is 1 if ours is over a tenth of LiteLLM's at the 99th percentile.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peers.process import Environment, PeerError, say

from localmoe.bench.gateway import EVENT_RATE_HZ, Delays, measure_delays, process
from localmoe.bench.gateway_process import serve_remote
from localmoe.bench.machine import cpu_name
from localmoe.bench.scripted_server import MODEL, run_scripted_server

VERSION = "1.104.1"
KEY = "sk-measured"
MOST_RATIO = 0.1
START_S = 180.0


@contextmanager
def litellm(workdir: Path, server_url: str) -> Iterator[str]:
    """LiteLLM's proxy before a server, as its documentation starts it; yields its address."""
    environment = Environment(workdir / "litellm")
    if not environment.has("litellm", VERSION):
        environment.pip("install", f"litellm[proxy]=={VERSION}")
    config = workdir / "litellm.yaml"
    parameters = {"model": f"openai/{MODEL}", "api_base": f"{server_url}/v1", "api_key": "none"}
    models = [{"model_name": MODEL, "litellm_params": parameters}]
    # JSON is YAML.
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": KEY}}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        environment.path / "bin" / "litellm",
        "--config",
        config,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    variables = {"LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    words = ["env", *(f"{name}={value}" for name, value in variables.items()), *map(str, command)]
    log = workdir / "litellm-serve.log"
    with log.open("w") as output, subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT) as proxy:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(f"{url}/health/liveliness", proxy, log)
            yield url
        finally:
            proxy.terminate()


def _wait_ready(url: str, proxy: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if proxy.poll() is not None or time.monotonic() > deadline_s:
                raise PeerError(f"LiteLLM did not start; see {log}") from None
            time.sleep(0.2)


def measure(workdir: Path, concurrency: int, rounds: int) -> dict[str, list[Delays]]:
    """Delays by system, one for each round."""
    with (
        process(run_scripted_server) as server,
        process(serve_remote, f"{server.url}/v1") as ours,
        litellm(workdir, server.url) as theirs,
    ):
        systems = {"direct": (server.url, None), "LocalMoE": (ours.url, None), "LiteLLM": (theirs, KEY)}
        found: dict[str, list[Delays]] = {name: [] for name in systems}
        for number in range(rounds):
            for name, (url, key) in systems.items():
                say(f"round {number + 1}: {name}")
                found[name].append(asyncio.run(measure_delays(url, MODEL, concurrency, key)))
    return found


def report(found: dict[str, list[Delays]], concurrency: int) -> float:
    """Prints it; returns our share of what LiteLLM adds at the 99th percentile."""

    def median(name: str, measure: str) -> float:
        return statistics.median(getattr(delays, measure) for delays in found[name])

    print(
        f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {concurrency} streams with {EVENT_RATE_HZ:g} events a second "
        f"each, medians of {len(found['direct'])} interleaved rounds, LiteLLM {VERSION}; "
        "added is against the server's median.\n"
    )
    print(
        "| ms | added p50 | added p99 | first event, added p50 | first event, added p99 |\n|---|---|---|---|---|"
    )
    added_p99 = {}
    for name in ("LocalMoE", "LiteLLM"):
        base, first = median("direct", "p50_ms"), median("direct", "first_p50_ms")
        added_p99[name] = median(name, "p99_ms") - base
        row = [median(name, "p50_ms") - base, added_p99[name]]
        row += [median(name, "first_p50_ms") - first, median(name, "first_p99_ms") - first]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    ratio = added_p99["LocalMoE"] / added_p99["LiteLLM"]
    print(f"\nLocalMoE / LiteLLM at p99: {ratio:.3f}, at most {MOST_RATIO}")
    return ratio


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(workdir, args.concurrency, args.rounds)
    except PeerError as error:
        sys.exit(f"error: {error}")
    return 0 if report(found, args.concurrency) <= MOST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
