"""A server of the demo model with several engines, and a client that streams from it: shared by benchmarks."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from localmoe.catalog.catalog import DEMO_NAME
from localmoe.cli.server_process import ServerProcess

FLOAT32 = {
    "LOCALMOE_VLLM__DTYPE": "float32",
    "LOCALMOE_DEEPSPEED__DTYPE": "float32",
}
BFLOAT16 = {
    "LOCALMOE_VLLM__DTYPE": "bfloat16",
    "LOCALMOE_DEEPSPEED__DTYPE": "bfloat16",
}
SMALL = {
    # All engines are on one machine: each gets what the demo model needs.
    "LOCALMOE_ENGINE__KV_CACHE_BYTES": str(1 << 30),
    "LOCALMOE_VLLM__KV_CACHE_BYTES": str(1 << 30),
    "LOCALMOE_DEEPSPEED__KV_CACHE_BYTES": str(1 << 29),
    "LOCALMOE_VLLM__MAX_MODEL_LEN": "4096",
}
STYLES = (
    "Explain",
    "Write a poem about",
    "Tell a story about",
    "List facts on",
    "Describe",
    "Praise",
    "Sell",
    "Mend",
)
TOPICS = ("the sea", "a bicycle", "winter", "bread", "the moon", "a lighthouse", "ants", "paper")


def prompts(count: int) -> list[str]:
    """Short ones, different up to 64."""
    pairs = [f"{style} {topic}." for style in STYLES for topic in TOPICS]
    return [pairs[index % len(pairs)] for index in range(count)]


@dataclass
class Answer:
    """What came of one request."""

    began_s: float = 0.0
    text: str = ""
    num_tokens: int = 0
    """By its log-probabilities, where asked for: each token has one."""
    times_s: list[float] = field(default_factory=list)
    """When each piece came."""
    ended_s: float = 0.0
    status: int = 0
    """Of HTTP; 0 if there was no answer at all."""
    error: str | None = None

    @property
    def took_s(self) -> float:
        return self.ended_s - self.began_s

    @property
    def silence_s(self) -> float:
        """The longest time between two pieces."""
        return max((b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)), default=0.0)


def engine_names(kinds: Sequence[str]) -> list[str]:
    """As the server names them."""
    return [
        f"{kind}-{kinds[: i + 1].count(kind)}" if kinds.count(kind) > 1 else kind for i, kind in enumerate(kinds)
    ]


@contextmanager
def serving(
    kinds: Sequence[str], settings: Mapping[str, str], *, model: str = DEMO_NAME, weights: str = "nvfp4"
) -> Iterator[tuple[str, int]]:
    """(URL, process id) of a server that listens; its engines may still be starting."""
    command = [sys.executable, "-m", "localmoe", "serve", model, "--port", "0", "--weights", weights]
    for kind in kinds:
        command += ["--engine", kind]
    words = ["env", *(f"{key}={value}" for key, value in settings.items()), *command]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or the server would stay
    with ServerProcess(words, grace_s=30.0) as server:
        yield server.wait_listening(lambda line: None), server.pid


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_read=900)
    )


async def all_ready(client: aiohttp.ClientSession, url: str, names: Sequence[str], model: str = DEMO_NAME) -> None:
    """Wait until every engine answers."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    for name in names:
        while True:
            headers = {"x-localmoe-engine": name}
            async with client.post(f"{url}/v1/completions", json=body, headers=headers) as response:
                if response.status == 200:
                    break
                if response.status != 503:
                    raise SystemExit(f"error: {name}: {await response.text()}")
            await asyncio.sleep(0.2)


async def stream(
    client: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    answer: Answer,
    headers: Mapping[str, str] | None = None,
) -> None:
    """A streamed completion, or chat completion where there are messages."""
    path = "chat/completions" if "messages" in body else "completions"
    answer.began_s = time.perf_counter()
    try:
        async with client.post(f"{url}/v1/{path}", json={**body, "stream": True}, headers=headers) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = (await response.json())["error"]["message"]
                return
            finished = False
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        answer.error = chunk["error"]["message"]
                        return
                    finished = _take(chunk["choices"], answer) or finished
            if not finished:
                answer.error = "ended without a finish reason"
    except aiohttp.ClientError as error:
        answer.error = str(error)
    finally:
        answer.ended_s = time.perf_counter()


def _take(choices: Sequence[Mapping[str, Any]], answer: Answer) -> bool:
    """Whether the answer has ended."""
    for choice in choices:
        answer.times_s.append(time.perf_counter())
        answer.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        answer.num_tokens += len((choice.get("logprobs") or {}).get("tokens", ()))
    return any(choice["finish_reason"] for choice in choices)


async def metric(client: aiohttp.ClientSession, url: str, name: str) -> float:
    """The sum of a metric's samples."""
    async with client.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))
