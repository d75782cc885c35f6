"""The real DeepSpeed on this machine's processor, in its own environment, which is installed where it is missing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.deepspeed import DeepSpeedBackend
from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.core.errors import BackendUnavailableError, EngineDiedError, EngineFaultError, EngineStartError
from localmoe.core.events import EngineState, Event, EventBus
from localmoe.core.request import FinishReason, Request, SamplingParams, TokenChunk
from support.checkpoints import greedy_reference
from support.engine_environments import with_engines
from support.models import greedy
from support.processes import descendants

pytestmark = pytest.mark.slow

NUM_TOKENS = 16
PROMPTS = [[(7 * i + j * j) % 300 for j in range(3 + 4 * i)] for i in range(20)]


@pytest.fixture(scope="session")
def deepspeed_python() -> Path:
    environments = with_engines("deepspeed")
    environments.link_package("deepspeed")
    return environments.python("deepspeed")


@pytest.fixture(scope="module")
def checkpoint(tiny_home: Path) -> Path:
    return tiny_home / "checkpoints" / "distinct-experts"


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """What transformers generates."""
    return greedy_reference(checkpoint, PROMPTS, NUM_TOKENS)


def make_backend(python: Path, path: Path, bus: EventBus | None = None, **config: Any) -> DeepSpeedBackend:
    settings = {"dtype": "float32", "num_threads": 1, "start_timeout_s": 500.0, **config}
    return DeepSpeedBackend(
        model="m", model_path=path, config=DeepSpeedConfig(**settings), python=python, bus=bus or EventBus()
    )


@asynccontextmanager
async def running(
    python: Path, path: Path, bus: EventBus | None = None, **config: Any
) -> AsyncIterator[DeepSpeedBackend]:
    backend = make_backend(python, path, bus, **config)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()


async def answer(backend: DeepSpeedBackend, request: Request) -> list[int]:
    async with asyncio.timeout(120):
        return [token async for chunk in backend.generate(request) for token in chunk.token_ids]


async def rest_of(chunks: AsyncIterator[TokenChunk]) -> list[int]:
    return [token async for chunk in chunks for token in chunk.token_ids]


def workers(pid: int) -> list[int]:
    """The descendants of a process that run our worker; rank 0 is the first."""
    return [
        child for child, command in descendants(pid).items() if "localmoe.backends.deepspeed_worker" in command
    ]


def wait_gone(pids: list[int]) -> None:
    limit = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < limit, "a worker outlives its gateway"
        time.sleep(0.05)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"offload_param": "none", "max_num_batched_tokens": 16, "max_num_seqs": 5},
        {"num_ranks": 2},
        {"num_ranks": 2, "expert_parallel_size": 2},
        {"mode": "init_inference"},
        {"mode": "init_inference", "num_ranks": 2},
    ],
    ids=str,
)
async def test_twenty_prompts_at_once_get_the_tokens_of_transformers(
    deepspeed_python: Path, checkpoint: Path, expected: list[list[int]], config: dict[str, Any]
) -> None:
    async with running(deepspeed_python, checkpoint, **config) as backend:
        requests = [greedy(str(i), prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]
        assert await asyncio.gather(*(answer(backend, request) for request in requests)) == expected


@pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="libaio's headers are not installed")
async def test_weights_may_be_on_a_disk_and_leave_it(
    deepspeed_python: Path, checkpoint: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    (tmp_path / "localmoe-deepspeed-left").mkdir()
    (tmp_path / "localmoe-deepspeed-left" / "lock").touch()
    config = {"offload_param": "nvme", "nvme_path": str(tmp_path)}
    async with running(deepspeed_python, checkpoint, **config) as backend:
        assert await answer(backend, greedy("a", PROMPTS[3], NUM_TOKENS)) == expected[3]
        assert files_in(tmp_path)
        assert not (tmp_path / "localmoe-deepspeed-left").exists()
    assert not files_in(tmp_path)


async def test_requests_come_and_go_between_steps(
    deepspeed_python: Path, checkpoint: Path, expected: list[list[int]]
) -> None:
    states: list[EngineState] = []

    def note(event: Event) -> None:
        if isinstance(event, EngineState):
            states.append(event)

    bus = EventBus()
    bus.subscribe(note)
    async with running(deepspeed_python, checkpoint, bus, max_num_seqs=2) as backend:
        async with aclosing(backend.generate(greedy("long", PROMPTS[0], 900))) as long:
            await anext(long)
            assert await answer(backend, greedy("short", PROMPTS[1], NUM_TOKENS)) == expected[1]
            chunk = await anext(long)
            assert chunk.finish_reason is None
        # The one that was left is cancelled: it is seen to be gone while another goes on.
        assert await answer(backend, greedy("next", PROMPTS[2], NUM_TOKENS)) == expected[2]
        assert states[-1].num_running == 0

        whole = [c async for c in backend.generate(greedy("a", PROMPTS[4], NUM_TOKENS))]
        assert whole[-1].finish_reason is FinishReason.LENGTH
        # Another engine broke off after five tokens.
        resumed = Request(
            id="b",
            model="m",
            prompt_ids=PROMPTS[4],
            resumed_ids=expected[4][:5],
            sampling=SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0),
        )
        assert await answer(backend, resumed) == expected[4][5:]

        seeded = SamplingParams(max_tokens=8, seed=5)
        draws = [Request(id="c", model="m", prompt_ids=PROMPTS[5], sampling=seeded)] * 2
        first, second = await asyncio.gather(*(answer(backend, request) for request in draws))
        assert first == second

        with pytest.raises(EngineFaultError, match="token ids must be from 0"):
            await answer(backend, greedy("bad", [100_000], 1))


async def test_a_rank_that_dies_ends_all_and_another_engine_takes_over(
    deepspeed_python: Path, checkpoint: Path, expected: list[list[int]]
) -> None:
    async with running(deepspeed_python, checkpoint, num_ranks=2) as backend:
        first, second = workers(os.getpid())
        async with aclosing(backend.generate(greedy("a", PROMPTS[0], 900))) as chunks:
            await anext(chunks)
            os.kill(second, signal.SIGKILL)
            with pytest.raises(EngineDiedError):
                await rest_of(chunks)
        wait_gone([first])
        async with asyncio.timeout(120):
            while True:
                try:
                    assert await answer(backend, greedy("b", PROMPTS[0], NUM_TOKENS)) == expected[0]
                    break
                except BackendUnavailableError:
                    await asyncio.sleep(0.2)


async def test_the_reason_is_named_when_it_cannot_start(deepspeed_python: Path, tiny_home: Path) -> None:
    olmoe = tiny_home / "checkpoints" / "olmoe"
    backend = make_backend(deepspeed_python, olmoe, num_ranks=2, expert_parallel_size=2)
    with pytest.raises(EngineStartError, match=r"type olmoe.*AutoEP knows.*mixtral"):
        await backend.start()
    backend = make_backend(deepspeed_python, olmoe, kv_cache_bytes=1000)
    with pytest.raises(EngineStartError, match="raise kv_cache_bytes"):
        await backend.start()
    assert workers(os.getpid()) == []


_GATEWAY = """
import asyncio, sys
from pathlib import Path
from localmoe.backends.deepspeed import DeepSpeedBackend
from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.core.events import EventBus
from localmoe.core.request import Request, SamplingParams

async def main():
    config = DeepSpeedConfig(num_ranks=2, num_threads=1, mode=sys.argv[3])
    backend = DeepSpeedBackend(
        model="m", model_path=Path(sys.argv[2]), config=config, python=Path(sys.argv[1]), bus=EventBus()
    )
    await backend.start()
    request = Request(id="a", model="m", prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=1000))
    async for _ in backend.generate(request):
        print("serving", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["zero3", "init_inference"])
def test_nothing_outlives_a_gateway_that_is_killed(deepspeed_python: Path, checkpoint: Path, mode: str) -> None:
    command = [sys.executable, "-c", _GATEWAY, str(deepspeed_python), str(checkpoint), mode]
    before = set(Path("/dev/shm").glob("deepspeed*"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        assert gateway.stdout.readline() == "serving\n"
        pids = workers(gateway.pid)
        assert len(pids) == 2
        gateway.kill()
    wait_gone(pids)
    assert set(Path("/dev/shm").glob("deepspeed*")) <= before
