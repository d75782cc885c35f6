"""A backend on a vLLM server that runs already: what is checked, what is noticed, and that it comes back."""

import asyncio
import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.vllm import ServedModel, VllmBackend
from localmoe.backends.vllm_config import LoraModule, VllmConfig
from localmoe.core.errors import BackendUnavailableError, EngineDiedError, EngineStartError
from localmoe.core.events import EngineRestarted, EngineState, Event, EventBus
from localmoe.core.request import Request, SamplingParams
from localmoe.text.grammar_source import written
from support.fake_vllm import VOCAB_SIZE, FakeVllm, fake_vllm, refuses

PROBES = [("hello", [1, 2])]


@pytest.fixture
async def fake() -> AsyncIterator[FakeVllm]:
    async with fake_vllm() as server:
        yield server


def backend_on(
    config: VllmConfig, bus: EventBus | None = None, python: Path | None = None, adapters: Sequence[str] = ()
) -> VllmBackend:
    return VllmBackend(
        model=ServedModel(name="m", vocab_size=VOCAB_SIZE, probes=PROBES, adapters=dict.fromkeys(adapters, None)),
        model_path=Path("checkpoint"),
        config=config,
        python=python,
        on_gpu=False,
        write_grammar=written,
        bus=bus or EventBus(),
    )


@asynccontextmanager
async def running(fake: FakeVllm, bus: EventBus | None = None, **config: Any) -> AsyncIterator[VllmBackend]:
    backend = backend_on(VllmConfig(url=fake.url, **config), bus)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()


def request(**fields: Any) -> Request:
    sampling = {"max_tokens": 3, "temperature": 0.0, **fields.pop("sampling", {})}
    return Request(
        **{"id": "a", "model": "m", "prompt_ids": [5], "sampling": SamplingParams(**sampling), **fields}
    )


async def answer(backend: VllmBackend) -> list[int]:
    async with asyncio.timeout(10):
        return [token async for chunk in backend.generate(request()) for token in chunk.token_ids]


async def test_it_answers_and_says_how_the_server_is(fake: FakeVllm) -> None:
    events: list[Event] = []
    bus = EventBus()
    bus.subscribe(events.append)
    async with running(fake, bus, hang_timeout_s=0.4, max_num_seqs=7) as backend:
        assert backend.is_ready
        assert backend.capacity == 7
        assert await answer(backend) == [5, 6, 7]
        await asyncio.sleep(0.3)
    states = [event for event in events if isinstance(event, EngineState)]
    assert (states[0].model, states[0].engine, states[0].num_running) == ("m", "vllm", 4)


async def test_a_request_with_an_adapter_names_it(fake: FakeVllm) -> None:
    fake.model, fake.adapters = "theirs", ["l", "k"]
    backend = backend_on(VllmConfig(url=fake.url), adapters=["l"])
    await backend.start()
    try:
        for asked in (request(), request(adapter="l")):
            assert [chunk async for chunk in backend.generate(asked)]
    finally:
        await backend.stop()
    assert [question["model"] for question in fake.questions[-2:]] == ["theirs", "l"]


async def test_a_server_without_the_adapter_is_refused(fake: FakeVllm) -> None:
    fake.adapters = ["k"]
    with pytest.raises(
        EngineStartError, match=r"has no adapter l; start it with --enable-lora and --lora-modules"
    ):
        await backend_on(VllmConfig(url=fake.url), adapters=["l", "k"]).start()


async def test_a_server_with_another_tokenizer_is_refused(fake: FakeVllm) -> None:
    fake.tokens = [1, 3]
    with pytest.raises(EngineStartError, match=r"another tokenizer: 'hello' is \[1, 3\] there and \[1, 2\] here"):
        async with running(fake):
            pass


async def test_a_server_that_does_not_send_token_ids_is_refused(fake: FakeVllm) -> None:
    fake.answer = refuses(200, {"choices": [{"text": "hello", "finish_reason": "stop"}]})
    with pytest.raises(EngineStartError, match="finish reason"):
        async with running(fake):
            pass


async def test_a_server_that_is_not_there_is_said_so() -> None:
    with pytest.raises(EngineStartError, match="does not answer to /v1/models"):
        await backend_on(VllmConfig(url="http://127.0.0.1:9")).start()


async def test_a_server_that_says_nothing_does_not_start(fake: FakeVllm) -> None:
    fake.answers_at_all = False
    with pytest.raises(EngineStartError, match=r"within 0\.5 s"):
        async with running(fake, hang_timeout_s=0.5):
            pass


async def test_a_server_that_hangs_fails_its_requests_and_is_connected_with_again(fake: FakeVllm) -> None:
    restarts: list[Event] = []
    bus = EventBus()
    bus.subscribe(lambda event: restarts.append(event) if isinstance(event, EngineRestarted) else None)
    async with running(fake, bus, hang_timeout_s=0.6) as backend:

        async def hangs(*_: Any) -> Any:
            await asyncio.sleep(60)

        fake.answer = hangs
        with pytest.raises(EngineDiedError, match="finished no step"):
            await answer(backend)
        assert not backend.is_ready
        fake.answer = None
        async with asyncio.timeout(10):
            while not backend.is_ready:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.05)
        assert await answer(backend) == [5, 6, 7]
    assert len(restarts) == 1


async def test_clients_in_a_hurry_find_out_a_server_that_hangs_too(fake: FakeVllm) -> None:
    async with running(fake, hang_timeout_s=0.6) as backend:

        async def hangs(*_: Any) -> Any:
            await asyncio.sleep(60)

        fake.answer = hangs
        num_asked = 0
        while backend.is_ready and num_asked < 40:
            num_asked += 1
            with contextlib.suppress(TimeoutError, EngineDiedError):
                async with asyncio.timeout(0.25):
                    await answer(backend)
        assert not backend.is_ready
        assert num_asked > 1


async def test_a_server_that_computes_for_others_does_not_hang(fake: FakeVllm) -> None:
    async with running(fake, hang_timeout_s=0.6) as backend:

        async def slow(asked: Any, body: dict[str, Any]) -> Any:
            await asyncio.sleep(1.5)
            fake.answer = None
            return await refuses(503, {"error": {"message": "at last"}})(asked, body)

        fake.answer = slow
        waiting = asyncio.create_task(answer(backend))
        while not waiting.done():
            fake.num_steps += 1
            await asyncio.sleep(0.05)
        with pytest.raises(BackendUnavailableError, match="at last"):
            await waiting
        assert backend.is_ready


async def test_a_server_that_goes_and_comes_is_connected_with_again() -> None:
    async with fake_vllm() as fake:
        url, port = fake.url, int(fake.url.rpartition(":")[2])
        backend = backend_on(VllmConfig(url=url, hang_timeout_s=0.4))
        await backend.start()
    try:
        async with asyncio.timeout(10):
            while backend.is_ready:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.05)
        with pytest.raises(BackendUnavailableError, match=r"has not answered for|has just ended"):
            await answer(backend)
        async with fake_vllm(port), asyncio.timeout(10):
            while not backend.is_ready:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.05)
            assert await answer(backend) == [5, 6, 7]
    finally:
        await backend.stop()


async def test_what_vllm_could_not_answer_as_asked_is_refused(fake: FakeVllm) -> None:
    async with running(fake) as backend:
        assert backend.refusal(request()) is None
        assert backend.refusal(request(resumed_ids=[6])) is None
        penalised = request(resumed_ids=[6], sampling={"presence_penalty": 0.5})
        assert "presence_penalty" in (backend.refusal(penalised) or "")
        assert backend.refusal(request(sampling={"presence_penalty": 0.5})) is None
        assert "20 alternatives" in (backend.refusal(request(sampling={"logprobs": 21})) or "")
        assert "64 tokens" in (backend.refusal(request(prompt_ids=[1] * 62)) or "")  # and 3 to come
        assert backend.refusal(request(prompt_ids=[])) is not None
        assert "native" in (backend.refusal(request(embed=True, sampling={"max_tokens": 0})) or "")


def fake_python(folder: Path, script: str) -> Path:
    """An interpreter that does this instead of running vLLM."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


async def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "import sys\nsys.exit('RuntimeError: no such model')")
    with pytest.raises(EngineStartError, match=r"(?s)ended with exit status 1.*no such model"):
        await backend_on(VllmConfig(), python=python).start()


async def test_a_server_that_never_comes_up_is_ended(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    python = fake_python(
        tmp_path,
        f"import os, pathlib, time\nprint('loading', flush=True)\n"
        f"pathlib.Path({str(note)!r}).write_text(str(os.getpid()))\ntime.sleep(60)",
    )
    with pytest.raises(EngineStartError, match=r"(?s)not ready within 1 s.*loading"):
        await backend_on(VllmConfig(start_timeout_s=1.0), python=python).start()
    assert not Path("/proc", note.read_text()).exists()  # noqa: ASYNC240


async def test_what_cannot_be_started_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    backend = VllmBackend(
        model=ServedModel(name="m", vocab_size=VOCAB_SIZE, adapters={"a": LoraModule(path=Path("a"), rank=1024)}),
        model_path=Path("m"),
        config=VllmConfig(),
        python=Path("python"),
        on_gpu=False,
        write_grammar=written,
        bus=EventBus(),
    )
    with pytest.raises(EngineStartError, match="rank 1024"):
        await backend.start()
    assert not os.listdir(tmp_path)
