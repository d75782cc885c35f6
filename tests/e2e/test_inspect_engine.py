"""Looking into a real engine: while it serves, when it dies or hangs, and what it leaves behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from localmoe.backends.native import NativeBackend
from localmoe.cli.server_process import ServerProcess
from localmoe.core.errors import BackendUnavailableError, EngineDiedError
from localmoe.core.events import EventBus
from localmoe.engine.config import EngineConfig
from localmoe.formats.store import Store
from localmoe.residency.trace import read_trace
from support.models import greedy
from support.server import engine_pid, metric, wait_ready

MODEL = "distinct-experts"
STORE = f"models/{MODEL}/stores/f32.store"


@asynccontextmanager
async def running(home: Path, **config: Any) -> AsyncIterator[NativeBackend]:
    backend = NativeBackend(
        model="m",
        store_path=home / STORE,
        config=EngineConfig(**{"num_threads": 1, **config}),
        available_memory=lambda: 1 << 32,
        bus=EventBus(),
    )
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()


async def answer(backend: NativeBackend, max_tokens: int) -> list[int]:
    request = greedy("a", [5, 6, 7], max_tokens)
    return [token async for chunk in backend.generate(request) for token in chunk.token_ids]


async def test_it_can_be_looked_into_while_it_serves(tiny_home: Path) -> None:
    async with running(tiny_home, speculation=False) as backend:
        first = await backend.inspect()
        assert np.sum(first.heat) == 0
        serving = asyncio.create_task(answer(backend, 300))
        seen = []
        while not serving.done():
            seen.append(int(np.sum((await backend.inspect()).heat)))
        assert len(await serving) == 300
        assert seen == sorted(seen)
        last = await backend.inspect()
        tokens = 3 + 300 - 1
        assert np.sum(last.heat) == tokens * last.top_k * last.num_layers
        assert len(set(seen)) > 2


async def test_those_who_ask_at_the_same_time_share_an_answer(tiny_home: Path) -> None:
    async with running(tiny_home) as backend:
        answers = await asyncio.gather(*(backend.inspect() for _ in range(50)))
        assert all(answer is answers[0] for answer in answers)
        assert await backend.inspect() is not answers[0]


async def test_who_leaves_does_not_take_the_answer_along(tiny_home: Path) -> None:
    async with running(tiny_home) as backend:
        stays, leaves = (asyncio.create_task(backend.inspect()) for _ in range(2))
        await asyncio.sleep(0)
        leaves.cancel()
        assert (await stays).model == "m"
        assert leaves.cancelled()


async def test_a_dead_engine_says_so_to_those_who_wait(tiny_home: Path) -> None:
    async with running(tiny_home) as backend:
        engine = engine_pid(os.getpid())
        os.kill(engine, signal.SIGSTOP)
        waiting = [asyncio.create_task(backend.inspect()) for _ in range(3)]
        await asyncio.sleep(0.05)
        os.kill(engine, signal.SIGKILL)
        async with asyncio.timeout(10):
            for found in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(found, EngineDiedError)
        with pytest.raises(BackendUnavailableError, match="not ready"):
            await backend.inspect()
        async with asyncio.timeout(60):
            while not backend.is_ready:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.02)
        assert np.sum((await backend.inspect()).heat) == 0


async def test_an_engine_that_is_busy_for_long_says_try_again(tiny_home: Path) -> None:
    async with running(tiny_home, hang_timeout_s=0.3) as backend:
        engine = engine_pid(os.getpid())
        os.kill(engine, signal.SIGSTOP)
        for _ in range(2):
            with pytest.raises(BackendUnavailableError, match="does not answer"):
                await backend.inspect()
        os.kill(engine, signal.SIGCONT)
        assert (await backend.inspect()).model == "m"


@contextmanager
def server_with_tiers(home: Path, trace: Path) -> Iterator[tuple[str, int]]:
    """(URL, process id) of a server that keeps a part of the experts in memory, and records."""
    with Store.open(home / STORE) as store:
        ram_bytes = store.total_bytes
    settings = {
        "LOCALMOE_HOME": home,
        "LOCALMOE_ENGINE__MAX_NUM_SEQS": 1,
        "LOCALMOE_ENGINE__MAX_NUM_BATCHED_TOKENS": 8,
        "LOCALMOE_ENGINE__MAX_CONTEXT_TOKENS": 64,
        "LOCALMOE_ENGINE__TIERS__RAM_BYTES": ram_bytes,
        "LOCALMOE_ENGINE__TIERS__RESERVE_BYTES": 1,
        "LOCALMOE_ENGINE__ROUTING_TRACE": trace,
    }
    command = ["env", *(f"{name}={value}" for name, value in settings.items()), sys.executable, "-m", "localmoe"]
    with ServerProcess([*command, "serve", MODEL, "--port", "0", "--weights", "f32"]) as process:
        url = process.wait_listening(lambda line: None)
        wait_ready(url, process.check_alive)
        yield url, process.pid


def complete(url: str, max_tokens: int) -> None:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    response = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text


def localmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "localmoe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_server_with_tiers_shows_them_and_leaves_a_trace(tiny_home: Path, tmp_path: Path) -> None:
    path = tmp_path / "routing.csv.gz"
    with server_with_tiers(tiny_home, path) as (url, pid):
        complete(url, 30)
        [inspection] = httpx2.get(f"{url}/v1/experts").json()["data"]
        tiers = inspection["tiers"]
        assert 0 < tiers["num_present"] <= tiers["num_slots"] < tiers["num_experts"]
        for command in ("experts", "memory", "bandwidth", "latency"):
            result = localmoe("inspect", command, "--url", url, "--json")
            assert (result.returncode, result.stderr) == (0, "")
            assert json.loads(result.stdout)["model"] == MODEL
            assert MODEL in localmoe("inspect", command, "--url", url).stdout
        assert metric(url, "localmoe_link_bytes_total") == inspection["links"][0]["num_bytes"]
        assert metric(url, "localmoe_expert_evictions_total") == tiers["evictions"]
        os.kill(engine_pid(pid), signal.SIGKILL)
        heat_LE = np.zeros_like(inspection["heat"])
        for use in read_trace(path).uses:
            np.add.at(heat_LE[use.layer], use.experts, 1)
        assert heat_LE.tolist() == inspection["heat"]  # nothing that was computed is missing
        result = localmoe("inspect", "memory", "--url", url)
        if result.returncode:
            assert "error: the engine of distinct-experts is not ready: restarting" in result.stderr
        wait_ready(url)
        complete(url, 5)
        deadline = time.monotonic() + 10
        while not (second := tmp_path / "routing.2.csv.gz").stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert read_trace(second).num_layers == len(heat_LE)
    assert sorted(tmp_path.iterdir()) == [second, path]
    assert localmoe("bench", "cache", "--trace", str(path)).returncode == 0


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        ("missing/a.csv", "but {folder}/missing is no directory that can be written to"),
        (".", "which is a directory; name a file in it"),
    ],
)
def test_a_trace_that_cannot_be_written_is_refused_at_once(
    tiny_home: Path, tmp_path: Path, trace: str, words: str
) -> None:
    command = [
        "env",
        f"LOCALMOE_HOME={tiny_home}",
        sys.executable,
        "-m",
        "localmoe",
        "serve",
        MODEL,
        "--port",
        "0",
    ]
    result = subprocess.run(
        [*command, "--routing-trace", trace],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert result.stderr == f"error: routing_trace is {trace!r}, {words.format(folder=tmp_path)}\n"
    assert list(tmp_path.iterdir()) == []
