"""`localmoe bench gateway`: what the gateway costs, with nothing behind it that computes.

A scripted server, one gateway and the client that measures are processes of their own. Delays are measured through a
server that streams by the clock and writes the time into each event, so they include sending and receiving; the same
without the gateway is measured beside it. Throughput is measured with answers that come from the gateway's own
process as token ids, one event a token, so that it includes detokenising.
"""

import asyncio
import itertools
import multiprocessing
import re
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from localmoe.bench.gateway_process import serve_remote, serve_scripted
from localmoe.bench.machine import cpu_name
from localmoe.bench.scripted_server import MODEL, Plan, run_scripted_server

EVENT_RATE_HZ = 20.0
NUM_EVENTS = 200
NUM_IDLE = 1000
NUM_TOKENS = 1000
_HOLD_S = 600.0
_SETTLE_S = 1.0
_STAMP = re.compile(rb'"content":"(\d+) ')

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Delays:
    """Of events, milliseconds from being sent by the server to being read by the client."""

    p50_ms: float
    p99_ms: float
    first_p50_ms: float
    """From sending the request to reading the first event."""
    first_p99_ms: float


@dataclass(frozen=True, kw_only=True)
class GatewayReport:
    """What was measured."""

    machine: str
    concurrency: int
    added_ms_p50: float
    """Through the gateway, less the median without it."""
    added_ms_p99: float
    added_first_ms_p50: float
    added_first_ms_p99: float
    through: Delays
    direct: Delays
    tokens_per_s: float
    """Of all streams together, one event a token."""
    bytes_per_stream: float
    """Of the gateway's memory, for a stream that is open and silent."""


@dataclass(frozen=True)
class Process:
    """One that serves."""

    pid: int
    url: str


@dataclass
class Stream:
    """What came of one, and when."""

    began_ns: int = 0
    reads: list[tuple[int, bytes]] = field(default_factory=list)
    """(monotonic time, what was read then)."""

    @property
    def delays_ms(self) -> list[float]:
        """Of each event."""
        return [(now - int(stamp)) / 1e6 for now, data in self.reads for stamp in _STAMP.findall(data)]

    @property
    def first_ms(self) -> float:
        """From the request to the first event."""
        return next((now - self.began_ns) / 1e6 for now, data in self.reads if _STAMP.search(data))


def measure_gateway(concurrency: int, model: Path, say: Say) -> GatewayReport:
    """Everything, in about a minute.

    Args:
        concurrency: streams at once.
        model: directory of a model, of which the tokenizer is used.
        say: told what is being measured.
    """
    with process(run_scripted_server) as server, process(serve_remote, f"{server.url}/v1") as gateway:
        say(f"delays of {concurrency} streams with {EVENT_RATE_HZ:g} events a second each")
        direct = asyncio.run(measure_delays(server.url, MODEL, concurrency))
        through = asyncio.run(measure_delays(gateway.url, MODEL, concurrency))
        say(f"memory of {NUM_IDLE} silent streams")
        bytes_per_stream = asyncio.run(_idle_bytes(gateway))
    with process(serve_scripted, model) as gateway:
        say(f"tokens a second of {concurrency} streams")
        tokens_per_s = asyncio.run(_tokens_per_s(gateway.url, concurrency))
    return GatewayReport(
        machine=cpu_name(),
        concurrency=concurrency,
        added_ms_p50=through.p50_ms - direct.p50_ms,
        added_ms_p99=through.p99_ms - direct.p50_ms,
        added_first_ms_p50=through.first_p50_ms - direct.first_p50_ms,
        added_first_ms_p99=through.first_p99_ms - direct.first_p50_ms,
        through=through,
        direct=direct,
        tokens_per_s=tokens_per_s,
        bytes_per_stream=bytes_per_stream,
    )


async def measure_delays(url: str, model: str, concurrency: int, key: str | None = None) -> Delays:
    """Of events through a server, or gateway, that has the scripted server's answers.

    Args:
        key: for gateways that ask for one.
    """
    plan = Plan(num_events=NUM_EVENTS, interval_s=1 / EVENT_RATE_HZ)
    async with _session(key) as client:
        await _stream(client, url, model, Plan(num_events=1, interval_s=0.0))  # whatever is done at the first only
        streams = await asyncio.gather(
            # Begun one after the other, or all events would come at once.
            *(
                _stream(client, url, model, plan, after_s=index / concurrency / EVENT_RATE_HZ)
                for index in range(concurrency)
            )
        )
    delays = sorted(itertools.chain.from_iterable(stream.delays_ms[1:] for stream in streams))
    firsts = sorted(stream.first_ms for stream in streams)
    return Delays(
        p50_ms=statistics.median(delays),
        p99_ms=_p99(delays),
        first_p50_ms=statistics.median(firsts),
        first_p99_ms=_p99(firsts),
    )


async def _idle_bytes(gateway: Process) -> float:
    """The gateway's memory for each stream that has begun and is silent."""
    before = _resident_bytes(gateway.pid)
    plan = Plan(num_events=1, interval_s=0.0, hold_s=_HOLD_S)
    async with _session() as client:
        begun = [asyncio.get_running_loop().create_future() for _ in range(NUM_IDLE)]
        tasks = [asyncio.create_task(_stream(client, gateway.url, MODEL, plan, begun=one)) for one in begun]
        try:
            await asyncio.gather(*begun)
            await asyncio.sleep(_SETTLE_S)
            return (_resident_bytes(gateway.pid) - before) / NUM_IDLE
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _tokens_per_s(url: str, concurrency: int) -> float:
    """Of all streams together, from the first request to the last event."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}

    async def read(client: aiohttp.ClientSession) -> int:
        num_bytes = num_events = 0
        async with client.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for data in response.content.iter_any():
                num_bytes += len(data)
                num_events += data.count(b"data: ")
        return num_events

    async with _session() as client:
        await read(client)
        began_s = time.perf_counter()
        await asyncio.gather(*(read(client) for _ in range(concurrency)))
        return concurrency * NUM_TOKENS / (time.perf_counter() - began_s)


async def _stream(
    client: aiohttp.ClientSession,
    url: str,
    model: str,
    plan: Plan,
    *,
    after_s: float = 0.0,
    begun: "asyncio.Future[None] | None" = None,
) -> Stream:
    await asyncio.sleep(after_s)
    stream = Stream(began_ns=time.monotonic_ns())
    messages = [{"role": "user", "content": msgspec.json.encode(plan).decode()}]
    body = {"model": model, "messages": messages, "stream": True}
    async with client.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for data in response.content.iter_any():
            # Parsed afterwards: it would delay other streams' reads.
            stream.reads.append((time.monotonic_ns(), data))
            if begun is not None and not begun.done():
                begun.set_result(None)
    return stream


def _session(key: str | None = None) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers={"authorization": f"Bearer {key}"} if key else None,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=60),
    )


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[Process]:
    """A server in a process of its own, that listens."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * NUM_IDLE) as listener:
        port = listener.getsockname()[1]
        # Spawned: a fork would have our memory, which is measured.
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=target, args=(listener, *arguments), daemon=True)
        process.start()
    assert process.pid is not None
    try:
        yield Process(process.pid, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.join(10)
        process.kill()
        process.join()


def _resident_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def _p99(values: Sequence[float]) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, int(0.99 * len(values)))]
