"""The real vLLM on this machine's processor, in its own environment, which is installed where it is missing."""

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

from localmoe.backends.vllm import ServedModel, VllmBackend
from localmoe.backends.vllm_config import FLAGS, VllmConfig
from localmoe.catalog.catalog import DEMO_NAME
from localmoe.core.errors import BackendUnavailableError, EngineStartError, InvalidRequestError
from localmoe.core.events import EngineState, Event, EventBus
from localmoe.core.request import FinishReason, Request, SamplingParams
from localmoe.text.grammar_source import written
from support.checkpoints import greedy_reference, write_checkpoint
from support.engine_environments import with_engines

pytestmark = pytest.mark.slow

PROMPTS = ([504, 3575, 282, 4649, 314], [2427, 4052, 253, 655, 665, 436, 253], [1604, 24, 33, 36, 24, 33])
NUM_TOKENS = 16
ENGINE_CORE = "VLLM::EngineCor"
"""What the kernel keeps of the process's name."""


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    return with_engines("vllm").python("vllm")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distinct experts, with heads of a size that vLLM's attention on a processor takes."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "m", "mixtral", head_dim=32)


def make_backend(python: Path, path: Path, vocab_size: int, bus: EventBus, **config: Any) -> VllmBackend:
    settings = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "kv_cache_bytes": 1 << 28, **config}
    return VllmBackend(
        model=ServedModel(name="m", vocab_size=vocab_size),
        model_path=path,
        config=VllmConfig(**{"max_model_len": 1024, "start_timeout_s": 300.0, **settings}),
        python=python,
        on_gpu=False,
        write_grammar=written,
        bus=bus,
    )


@asynccontextmanager
async def running(python: Path, path: Path, vocab_size: int, bus: EventBus) -> AsyncIterator[VllmBackend]:
    backend = make_backend(python, path, vocab_size, bus)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()


def request(prompt_ids: list[int], max_tokens: int, **fields: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields.pop("sampling", {}))
    return Request(id="a", model="m", prompt_ids=prompt_ids, sampling=sampling, **fields)


async def answer(backend: VllmBackend, asked: Request) -> list[int]:
    async with asyncio.timeout(120):
        return [token async for chunk in backend.generate(asked) for token in chunk.token_ids]


def processes_of(python: Path) -> dict[int, str]:
    """All that have loaded something of this environment, by what they call themselves."""
    home = str(python.parent.parent / "lib")
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if home in (process / "maps").read_text():
                found[int(process.name)] = (process / "comm").read_text().strip()
        except OSError:
            continue  # it ended while we looked
    return found


def new_names(python: Path, before: dict[int, str]) -> set[str]:
    return {name for pid, name in processes_of(python).items() if pid not in before}


async def test_the_demo_model(vllm_python: Path, demo_home: Path) -> None:
    """One start for all that a running server is asked, since it takes half a minute."""
    path = demo_home / "models" / DEMO_NAME
    expected = greedy_reference(path, PROMPTS, NUM_TOKENS)
    before = processes_of(vllm_python)
    states: list[EngineState] = []
    bus = EventBus()

    def keep(event: Event) -> None:
        if isinstance(event, EngineState):
            states.append(event)

    bus.subscribe(keep)
    async with running(vllm_python, path, 49152, bus) as backend:
        found = await asyncio.gather(*(answer(backend, request(ids, NUM_TOKENS)) for ids in PROMPTS))
        assert found == expected
        # An answer that another engine began goes on at the same token.
        resumed = request(PROMPTS[0], NUM_TOKENS, resumed_ids=expected[0][:7])
        assert await answer(backend, resumed) == expected[0][7:]
        await check_details(backend, expected)
        await check_abort(backend, states)
        assert states[-1].prefix_cache_queries > 0
        assert states[-1].kv_blocks_total > 0
    assert processes_of(vllm_python).keys() <= before.keys()


async def test_distinct_experts_and_an_engine_that_is_killed(vllm_python: Path, tiny_model: Path) -> None:
    prompts = tuple([3 + (7 * i + 31 * j) % 300 for j in range(5 + 9 * i)] for i in range(4))
    expected = greedy_reference(tiny_model, prompts, NUM_TOKENS)
    before = processes_of(vllm_python)
    async with running(vllm_python, tiny_model, 306, EventBus()) as backend:
        found = await asyncio.gather(*(answer(backend, request(ids, NUM_TOKENS)) for ids in prompts))
        assert found == expected
        task = asyncio.create_task(answer(backend, request(prompts[0], 900)))
        await asyncio.sleep(1)
        names = {name: pid for pid, name in processes_of(vllm_python).items() if pid not in before}
        os.kill(names[ENGINE_CORE], signal.SIGKILL)
        async with asyncio.timeout(10):
            with pytest.raises(BackendUnavailableError):
                await task
        async with asyncio.timeout(200):
            while backend.is_ready:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.05)
            while not backend.is_ready:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.2)
        assert await answer(backend, request(prompts[1], NUM_TOKENS)) == expected[1]
    assert processes_of(vllm_python).keys() <= before.keys()


async def check_details(backend: VllmBackend, expected: list[list[int]]) -> None:
    ids = PROMPTS[0]
    (scored,) = [chunk async for chunk in backend.generate(request(ids, 0, sampling={"prompt_logprobs": 2}))]
    assert scored.token_ids == []
    assert scored.prompt_logprobs is not None
    assert [it.token_id for it in scored.prompt_logprobs] == ids[1:]
    assert all(len(it.top) == 2 for it in scored.prompt_logprobs)
    sampling = {"logprobs": 3, "stop_token_ids": (expected[0][4],)}
    chunks = [chunk async for chunk in backend.generate(request(ids, NUM_TOKENS, sampling=sampling))]
    stop = expected[0].index(expected[0][4])
    assert [token for chunk in chunks for token in chunk.token_ids] == expected[0][: stop + 1]
    assert chunks[-1].finish_reason is FinishReason.STOP
    for chunk in chunks:
        assert [it.token_id for it in chunk.logprobs] == chunk.token_ids
        assert all(it.top[0] == (it.token_id, it.logprob) and len(it.top) == 3 for it in chunk.logprobs)
    with pytest.raises(InvalidRequestError, match="out of vocabulary"):
        await answer(backend, request([1 << 20], 1))


async def check_abort(backend: VllmBackend, states: list[EngineState]) -> None:
    async with aclosing(backend.generate(request(PROMPTS[0], 1000))) as chunks:
        async for _ in chunks:
            break
    states.clear()
    async with asyncio.timeout(30):
        while not states or states[-1].num_running:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.1)


_OWNER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_vllm import make_backend
from localmoe.core.events import EventBus

async def main():
    backend = make_backend(Path(sys.argv[1]), Path(sys.argv[2]), 306, EventBus())
    await backend.start()

asyncio.run(main())
"""


def test_nothing_survives_its_owner(vllm_python: Path, tiny_model: Path) -> None:
    before = processes_of(vllm_python)
    arguments = [str(vllm_python), str(tiny_model), str(Path(__file__).parent)]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER, *arguments], stderr=subprocess.DEVNULL, env=environ
    ) as owner:
        deadline_s = time.monotonic() + 120
        while ENGINE_CORE not in new_names(vllm_python, before):
            assert owner.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        owner.kill()
    time.sleep(2)
    assert processes_of(vllm_python).keys() <= before.keys()


async def test_a_model_that_is_not_there_says_why(vllm_python: Path, tmp_path: Path) -> None:
    backend = make_backend(vllm_python, tmp_path / "nothing", 100, EventBus())
    with pytest.raises(EngineStartError, match="nothing"):
        await backend.start()


def test_vllm_knows_every_flag(vllm_python: Path) -> None:
    said = subprocess.run(
        [str(vllm_python), "-I", "-m", "vllm.entrypoints.openai.api_server", "--help=all"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for flag in (*FLAGS.values(), "--uds", "--generation-config", "--enable-prompt-tokens-details"):
        assert f"{flag} " in said or f"{flag}," in said
