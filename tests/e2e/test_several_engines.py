"""Servers with several native engines and models: engines that are killed, models that are switched under load."""

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support.processes import descendants
from support.server import check_gone, engine_pids, running_server

MODEL = "distinct-experts"
EVEN = {
    # Even shares, so that each engine has answers to lose.
    "DISPATCH__POLICY": "round_robin",
    "DISPATCH__PREFIX_AFFINITY": "false",
}


@dataclass
class Streamed:
    """What came of one stream."""

    text: str = ""
    num_pieces: int = 0
    finish_reason: str | None = None
    error: str | None = None


@dataclass
class Client:
    """Asks one server."""

    session: aiohttp.ClientSession
    url: str
    answers: list[Streamed] = field(default_factory=list)

    async def stream(self, prompt: str, **fields: Any) -> str:
        """The text of a whole answer; raises whatever is wrong with it."""
        answer = Streamed()
        self.answers.append(answer)
        body = {"model": MODEL, "prompt": prompt, "temperature": 0, "ignore_eos": True, "stream": True, **fields}
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    (choice,) = chunk["choices"]
                    answer.text += choice["text"]
                    answer.num_pieces += 1
                    answer.finish_reason = choice["finish_reason"]
        assert answer.finish_reason == "length"
        return answer.text

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        async with self.session.post(f"{self.url}/v1/models/{path}", json=body) as response:
            return response.status, await response.json()

    async def num_ready(self) -> int:
        """Engines that answer."""
        async with self.session.get(f"{self.url}/v1/experts") as response:
            return len((await response.json())["data"])

    async def total(self, name: str) -> float:
        """Of a metric, whatever its labels."""
        async with self.session.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    async def models(self) -> list[str]:
        async with self.session.get(f"{self.url}/v1/models") as response:
            return [model["id"] for model in (await response.json())["data"]]


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=50)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield Client(session, url)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(40):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def ask_all(client: Client, num_tokens: int, victim: int | None = None) -> list[str]:
    """Greedy answers and drawn ones; an engine is killed when a third of them has come."""
    client.answers.clear()
    asked = [client.stream(f"Tell me of {index} foxes", max_tokens=num_tokens) for index in range(8)]
    asked += [
        client.stream(f"Tell me of {seed} dogs", max_tokens=num_tokens, temperature=1, seed=seed)
        for seed in (7, 8)
    ]
    tasks = [asyncio.create_task(one) for one in asked]
    if victim is not None:
        # Pieces are tokens, but for those that are no whole letter yet.
        await until(lambda: sum(answer.num_pieces for answer in client.answers) > len(tasks) * num_tokens / 5)
        os.kill(victim, signal.SIGKILL)
    return await asyncio.gather(*tasks)


async def both_ready(client: Client) -> None:
    async with asyncio.timeout(40):
        while await client.num_ready() < 2:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.05)


async def test_answers_survive_the_death_of_their_engine(tiny_home: Path) -> None:
    with running_server(tiny_home, MODEL, "f32", engines=["native"] * 2, settings=EVEN) as (url, pid):
        async with client_of(url) as client:
            await both_ready(client)
            undisturbed = await ask_all(client, 400)
            assert len(set(undisturbed)) == len(undisturbed)
            num_resumed = 0.0
            for _ in range(2):
                victim = engine_pids(pid)[0]  # the oldest, so each of the two in turn
                assert await ask_all(client, 400, victim=victim) == undisturbed
                num_resumed, before = await client.total("localmoe_streams_resumed_total"), num_resumed
                assert num_resumed >= before + 3
                await until(lambda: len(engine_pids(pid)) == 2)
                await both_ready(client)


async def test_models_are_switched_under_load(tiny_home: Path) -> None:
    """By the name that it had from the beginning each request finds a model, and has its whole answer from one."""
    prompts = [f"Tell me of {index} foxes" for index in range(16)]
    stopping = asyncio.Event()
    with running_server(tiny_home, MODEL, "f32") as (url, pid):
        async with client_of(url) as client:
            (first,) = engine_pids(pid)

            async def keep_asking(prompt: str) -> list[str]:
                texts = []
                while not stopping.is_set():
                    texts.append(await client.stream(prompt, max_tokens=60))
                return texts

            async def ask_each() -> list[str]:
                return await asyncio.gather(*(client.stream(prompt, max_tokens=60) for prompt in prompts))

            of_old = await ask_each()
            asking = [asyncio.create_task(keep_asking(prompt)) for prompt in prompts]
            await until(lambda: len(client.answers) > 40)
            status, said = await client.post("switch", {"model": "dense", "weights": "f32", "replace": MODEL})
            assert (status, said.get("id"), said.get("root")) == (200, "dense", "dense")
            num_asked = len(client.answers)
            await until(lambda: len(client.answers) > num_asked + 32)
            stopping.set()
            texts = await asyncio.gather(*asking)
            check_gone(first)
            of_new = await ask_each()
            assert await client.stream(prompts[0], max_tokens=60, model="dense") == of_new[0]
    for index, texts_of_one in enumerate(texts):
        num_old = texts_of_one.count(of_old[index])
        assert of_old[index] != of_new[index]
        assert 0 < num_old < len(texts_of_one)
        assert texts_of_one == [of_old[index]] * num_old + [of_new[index]] * (len(texts_of_one) - num_old)


@pytest.fixture
def home_with_damage(tiny_home: Path, tmp_path: Path) -> Path:
    """A model of which one weight has another bit."""
    shutil.copytree(tiny_home / "models", tmp_path / "models")
    store = tmp_path / "models/olmoe/stores/f32.store"
    data = bytearray(store.read_bytes())
    data[len(data) - len(data) // 4] ^= 1
    store.write_bytes(data)
    return tmp_path


async def test_what_cannot_be_loaded_changes_nothing(home_with_damage: Path) -> None:
    with running_server(home_with_damage, MODEL, "f32") as (url, pid):
        async with client_of(url) as client:
            before = await client.stream("Hello", max_tokens=20)
            long = asyncio.create_task(client.stream("Hello", max_tokens=900))
            for path in ("switch", "load"):
                for model, expected, words in (
                    ("olmoe", (422, "model_load_failed"), "is damaged"),
                    ("no-such-model", (404, "model_not_found"), "available: dense, distinct-experts"),
                ):
                    status, said = await client.post(path, {"model": model, "weights": "f32"})
                    assert (status, said["error"]["code"]) == expected
                    assert words in said["error"]["message"]
            assert await client.models() == [MODEL]
            assert await client.stream("Hello", max_tokens=20) == before
            assert (await long).startswith(before)
            assert len(engine_pids(pid)) == 1


async def test_models_come_and_go(tiny_home: Path) -> None:
    with running_server(tiny_home, MODEL, "f32") as (url, pid):
        async with client_of(url) as client:
            (first,), before = engine_pids(pid), descendants(pid).keys()
            body = {"model": "dense", "name": "second", "weights": "f32", "engines": ["native", "native"]}
            assert (await client.post("load", body))[0] == 200
            assert await client.models() == [MODEL, "second"]
            assert (
                len({await client.stream("Hello", max_tokens=20, model=model) for model in (MODEL, "second")}) == 2
            )
            await until(lambda: len(engine_pids(pid)) == 3)
            assert (await client.post("load", body))[1]["error"]["code"] == "conflict"
            others = set(engine_pids(pid)) - {first}
            long = asyncio.create_task(client.stream("Hello", max_tokens=900, model="second"))
            await until(lambda: len(client.answers) == 3 and client.answers[-1].num_pieces > 0)
            assert (await client.post("unload", {"model": "second"}))[0] == 200
            assert long.done()
            await long
            for other in others:
                check_gone(other)
            assert engine_pids(pid) == [first]
            assert descendants(pid).keys() == before
            assert (await client.post("unload", {"model": "second"}))[0] == 404
            assert await client.models() == [MODEL]


async def test_what_does_not_fit_into_memory_is_refused(tiny_home: Path) -> None:
    small = {"engine": "native", "settings": {"kv_cache_bytes": 1 << 25}}
    settings = {
        "MODELS": json.dumps([{"model": MODEL, "weights": "f32", "engines": [small]}]),
        "ENGINE__KV_CACHE_BYTES": str(1 << 50),  # of all others
    }
    with running_server(tiny_home, None, None, settings=settings) as (url, pid):
        async with client_of(url) as client:
            engines = engine_pids(pid)
            for path in ("load", "switch"):
                status, said = await client.post(path, {"model": "dense", "weights": "f32"})
                assert (status, said["error"]["code"]) == (409, "insufficient_memory")
                assert "dense needs 1125900.0 GB of RAM" in said["error"]["message"]
            assert await client.models() == [MODEL]
            assert engine_pids(pid) == engines
            await client.stream("Hello", max_tokens=20)


@pytest.mark.parametrize("end_signal", [signal.SIGTERM, signal.SIGKILL])
def test_no_engine_outlives_the_server(tiny_home: Path, end_signal: signal.Signals) -> None:
    with running_server(tiny_home, MODEL, "f32", engines=["native"] * 2) as (_, pid):
        while len(engines := engine_pids(pid)) < 2:
            time.sleep(0.01)
        os.kill(pid, end_signal)  # perhaps before the second one is ready
        for engine in engines:
            check_gone(engine)
