"""The scripted backend keeps the contract that engines keep."""

from contextlib import aclosing

import pytest

from localmoe.backends.base import Backend
from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import BackendUnavailableError, EngineFaultError
from localmoe.core.request import FinishReason, Request, SamplingParams, TokenChunk, Usage


def request(**sampling: object) -> Request:
    params = SamplingParams(**{"max_tokens": 10, **sampling})  # type: ignore[arg-type]
    return Request(id="r", model="m", prompt_ids=[1, 2, 3], sampling=params)


async def answer(backend: ScriptedBackend, given: Request) -> list[TokenChunk]:
    await backend.start()
    return [chunk async for chunk in backend.generate(given)]


async def test_it_is_a_backend() -> None:
    backend: Backend = ScriptedBackend([5])
    assert not backend.is_ready
    with pytest.raises(BackendUnavailableError):
        await anext(backend.generate(request()))
    await backend.start()
    assert backend.is_ready
    await backend.stop()
    assert not backend.is_ready


@pytest.mark.parametrize(
    ("script", "sampling", "ids", "reason"),
    [
        ([5, 6, 7], {}, [5, 6, 7], FinishReason.STOP),
        ([5, 6, 7], {"max_tokens": 2}, [5, 6], FinishReason.LENGTH),
        ([5, 6, 7], {"max_tokens": 3}, [5, 6, 7], FinishReason.STOP),
        ([5, 6, 7], {"stop_token_ids": (6,)}, [5, 6], FinishReason.STOP),
        ([5, 6, 7], {"max_tokens": 0}, [], FinishReason.LENGTH),
        ([], {}, [], FinishReason.STOP),
    ],
)
async def test_how_answers_end(
    script: list[int], sampling: dict[str, object], ids: list[int], reason: FinishReason
) -> None:
    chunks = await answer(ScriptedBackend(script), request(**sampling))
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [reason]
    assert chunks[0].usage == Usage(prompt_tokens=3, completion_tokens=len(chunks[0].token_ids))
    assert [chunk.usage for chunk in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert chunks[-1].usage == Usage(prompt_tokens=3, completion_tokens=len(ids))


async def test_logprobs_have_the_shape_asked_for() -> None:
    chunks = await answer(ScriptedBackend([0, 6]), request(logprobs=2, prompt_logprobs=1))
    assert [[len(entry.top) for entry in chunk.logprobs] for chunk in chunks] == [[2], [2]]
    assert [chunk.logprobs[0].token_id for chunk in chunks] == [0, 6]
    assert len({token_id for token_id, _ in chunks[0].logprobs[0].top}) == 2
    assert chunks[0].prompt_logprobs is not None
    assert [entry.token_id for entry in chunks[0].prompt_logprobs] == [2, 3]
    assert chunks[1].prompt_logprobs is None
    plain = await answer(ScriptedBackend([0]), request())
    assert (plain[0].logprobs, plain[0].prompt_logprobs) == ([], None)


async def test_a_failure_comes_where_the_script_has_it() -> None:
    backend = ScriptedBackend([5, 6], failure=ScriptedFailure(error=EngineFaultError("x"), after_tokens=1))
    await backend.start()
    stream = backend.generate(request())
    assert (await anext(stream)).token_ids == [5]
    with pytest.raises(EngineFaultError):
        await anext(stream)
    assert (backend.num_running, backend.num_cancelled) == (0, 0)


async def test_closing_cancels() -> None:
    backend = ScriptedBackend(lambda given: given.prompt_ids * 9)
    await backend.start()
    async with aclosing(backend.generate(request())) as stream:
        assert (await anext(stream)).token_ids == [1]
        assert backend.num_running == 1
    assert (backend.num_running, backend.num_cancelled) == (0, 1)
