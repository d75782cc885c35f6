"""The native backend's edges: death, hanging, refusal and cancellation at awkward moments."""

import asyncio
import contextlib
import math
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.base import Backend
from localmoe.backends.native import NativeBackend
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    OverloadedError,
)
from localmoe.core.events import EventBus
from localmoe.core.request import Request
from localmoe.engine.config import EngineConfig
from support.models import greedy, to_embed
from support.server import engine_pid

STORE = "models/distinct-experts/stores/f32.store"


def make_backend(store_path: Path, **config: Any) -> NativeBackend:
    return NativeBackend(
        model="m",
        store_path=store_path,
        config=EngineConfig(**{"num_threads": 1, **config}),
        available_memory=lambda: 1 << 32,
        bus=EventBus(),
    )


@asynccontextmanager
async def running(store_path: Path, **config: Any) -> AsyncIterator[Backend]:
    backend = make_backend(store_path, **config)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()


async def answer(backend: Backend, request: Request) -> list[int]:
    return [token async for chunk in backend.generate(request) for token in chunk.token_ids]


async def wait_until(backend: Backend, ready: bool) -> None:
    async with asyncio.timeout(60):
        while backend.is_ready != ready:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.02)


async def test_the_first_chunk_and_the_last_say_what_the_request_took(tiny_home: Path) -> None:
    async with running(tiny_home / STORE) as backend:
        chunks = [chunk async for chunk in backend.generate(greedy("a", [5, 6, 7], 4))]
    assert [chunk.usage is not None for chunk in chunks] == [True, False, False, True]
    last = chunks[-1].usage
    assert last is not None
    assert (last.prompt_tokens, last.completion_tokens) == (3, 4)
    assert last.queue_s is not None
    assert last.queue_s >= 0


async def test_an_embedding_comes_over_the_wire(tiny_home: Path) -> None:
    async with running(tiny_home / STORE) as backend:
        asked = to_embed("a", [5, 6, 7])
        assert backend.refusal(asked) is None
        [chunk] = [chunk async for chunk in backend.generate(asked)]
    assert chunk.embedding is not None
    assert len(chunk.embedding) == 64 * 4
    assert math.hypot(*memoryview(chunk.embedding).cast("f")) == pytest.approx(1.0, abs=1e-6)


async def test_a_request_just_after_the_engines_death_fails_at_once(tiny_home: Path) -> None:
    async with running(tiny_home / STORE) as backend:
        os.kill(engine_pid(os.getpid()), signal.SIGKILL)
        async with asyncio.timeout(5):
            for _ in range(20):
                with pytest.raises(BackendUnavailableError):
                    await answer(backend, greedy("a", [5], 1000))


async def test_a_hung_engine_is_killed_and_replaced(tiny_home: Path) -> None:
    async with running(tiny_home / STORE, hang_timeout_s=1.0) as backend:
        hung = engine_pid(os.getpid())
        os.kill(hung, signal.SIGSTOP)
        async with asyncio.timeout(10):
            with pytest.raises(EngineDiedError, match=r"finished no step for \d s and was killed"):
                await answer(backend, greedy("a", [5], 4))
        await wait_until(backend, ready=True)
        assert engine_pid(os.getpid()) != hung
        assert len(await answer(backend, greedy("a", [5], 4))) == 4


async def test_clients_in_a_hurry_find_out_a_hung_engine_too(tiny_home: Path) -> None:
    async with running(tiny_home / STORE, hang_timeout_s=1.0) as backend:
        hung = engine_pid(os.getpid())
        os.kill(hung, signal.SIGSTOP)
        async with asyncio.timeout(20):
            while backend.is_ready:
                with contextlib.suppress(TimeoutError, EngineDiedError):
                    async with asyncio.timeout(0.3):
                        await answer(backend, greedy("a", [5], 4))
        await wait_until(backend, ready=True)
        assert engine_pid(os.getpid()) != hung


async def test_who_reads_slowly_does_not_make_an_engine_hang(tiny_home: Path) -> None:
    async with running(tiny_home / STORE, hang_timeout_s=0.5) as backend:
        engine = engine_pid(os.getpid())
        async with aclosing(backend.generate(greedy("a", [5], 8))) as chunks:
            tokens = list((await anext(chunks)).token_ids)
            await asyncio.sleep(1.5)
            async for chunk in chunks:
                tokens += chunk.token_ids
        assert len(tokens) == 8
        assert engine_pid(os.getpid()) == engine


async def test_what_ends_a_whole_group_leaves_the_engine_to_its_client(tiny_home: Path) -> None:
    async with running(tiny_home / STORE) as backend:
        engine = engine_pid(os.getpid())
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine, number)
        assert len(await answer(backend, greedy("a", [5], 4))) == 4
        assert engine_pid(os.getpid()) == engine


async def test_an_engine_that_cannot_restart_is_tried_again_until_it_can(tiny_home: Path, tmp_path: Path) -> None:
    store = tmp_path / "f32.store"
    store.symlink_to(tiny_home / STORE)
    async with running(store) as backend:
        store.unlink()
        os.kill(engine_pid(os.getpid()), signal.SIGKILL)
        await wait_until(backend, ready=False)
        async with asyncio.timeout(30):
            while True:
                with pytest.raises(BackendUnavailableError) as caught:
                    await answer(backend, greedy("a", [5], 4))
                if f"{store}: cannot be opened" in str(caught.value):
                    break
                await asyncio.sleep(0.1)
        store.symlink_to(tiny_home / STORE)
        await wait_until(backend, ready=True)
        assert len(await answer(backend, greedy("a", [5], 4))) == 4


async def test_stopping_during_a_restart_leaves_nothing(tiny_home: Path) -> None:
    async with running(tiny_home / STORE) as backend:
        os.kill(engine_pid(os.getpid()), signal.SIGKILL)
        await wait_until(backend, ready=False)
        await asyncio.sleep(0.8)  # the new engine is loading
    with pytest.raises(AssertionError, match="has no engine"):
        engine_pid(os.getpid())


async def test_giving_up_on_a_start_leaves_nothing(tiny_home: Path) -> None:
    backend = make_backend(tiny_home / STORE)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(backend.start(), 0.3)
    assert not backend.is_ready
    with pytest.raises(AssertionError, match="has no engine"):
        engine_pid(os.getpid())


async def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    backend = make_backend(tmp_path / "missing.store")
    with pytest.raises(EngineStartError, match=r"missing\.store: cannot be opened"):
        await backend.start()
    with pytest.raises(AssertionError, match="has no engine"):
        engine_pid(os.getpid())


_BREAKS_AN_IMPORT = """
import sys

class Breaker:
    def find_spec(self, name, path=None, target=None):
        if name == "localmoe.kernels.cpu":
            raise RuntimeError("a bug")

sys.meta_path.insert(0, Breaker())
"""


async def test_a_start_that_fails_in_a_way_of_its_own_says_why_too(
    tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("localmoe._cpu", reason="the C++ kernels were not built")
    (tmp_path / "sitecustomize.py").write_text(_BREAKS_AN_IMPORT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineStartError, match="a bug"):
        await make_backend(tiny_home / STORE).start()


async def test_a_full_queue_and_a_bad_request_cost_nobody_else_anything(tiny_home: Path) -> None:
    async with running(tiny_home / STORE, max_num_seqs=1, max_num_queued=1) as backend:
        answers = await asyncio.gather(
            *(answer(backend, greedy(f"{i}", [5], 200)) for i in range(6)), return_exceptions=True
        )
        refused = [a for a in answers if isinstance(a, OverloadedError)]
        assert 1 <= len(refused) <= 5
        assert all(len(a) == 200 for a in answers if isinstance(a, list))
        good, bad, long = await asyncio.gather(
            answer(backend, greedy("good", [5], 50)),
            answer(backend, greedy("bad", [1 << 20], 50)),
            answer(backend, greedy("long", [5], 5000)),
            return_exceptions=True,
        )
        assert isinstance(good, list)
        assert isinstance(bad, EngineFaultError)
        assert "token ids must be from 0 to" in str(bad)
        assert isinstance(long, EngineFaultError | OverloadedError)


async def test_closing_a_stream_frees_its_blocks(tiny_home: Path) -> None:
    async with running(tiny_home / STORE) as backend:
        stream = backend.generate(greedy("a", [5] * 100, 900))
        await anext(stream)
        await stream.aclose()
        # The engine answers in order, so by the end of this one the cancellation has been seen.
        assert len(await answer(backend, greedy("b", [6], 2))) == 2
