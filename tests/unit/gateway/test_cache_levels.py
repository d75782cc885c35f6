"""The cache's levels, keys and recordings."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.core.protocols import Generator
from localmoe.core.request import (
    FinishReason,
    Grammar,
    PromptSource,
    Request,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from localmoe.gateway.cache.answers import CachingGenerator
from localmoe.gateway.cache.config import CacheConfig
from localmoe.gateway.cache.disk import DiskLevel
from localmoe.gateway.cache.key import answer_key, is_repeatable
from localmoe.gateway.cache.levels import Cache
from localmoe.gateway.cache.memory import MemoryLevel
from localmoe.gateway.cache.sealed import seal, unseal
from localmoe.gateway.cache.use import CacheUse, bound

KEY = bytes(range(32))
SAMPLING = SamplingParams(max_tokens=100, temperature=0.0)
REQUEST = Request(id="r", model="m", prompt_ids=[1, 2, 3], sampling=SAMPLING)


def key_of(request: Request, **changes: str) -> bytes:
    return answer_key(request, **{"model_version": "v", "scope": "anna", **changes})


def keys(number: int) -> list[bytes]:
    return [bytes([place]) * 32 for place in range(number)]


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@given(st.binary(max_size=200), st.floats(0, 1e9), st.integers(0, 500), st.integers(0, 7))
def test_what_is_damaged_is_not_unsealed(data: bytes, now_s: float, place: int, bit: int) -> None:
    sealed = bytearray(seal(data, now_s))
    assert unseal(bytes(sealed), now_s=now_s, ttl_s=1) == data
    sealed[place % len(sealed)] ^= 1 << bit
    assert unseal(bytes(sealed), now_s=now_s, ttl_s=1) is None
    assert unseal(bytes(sealed[: place % len(sealed)]), now_s=now_s, ttl_s=1) is None


def test_what_is_old_or_from_the_future_is_not_unsealed() -> None:
    sealed = seal(b"x", 100.0)
    assert unseal(sealed, now_s=109.9, ttl_s=10) == b"x"
    assert unseal(sealed, now_s=110.1, ttl_s=10) is None
    assert unseal(sealed, now_s=99.0, ttl_s=10) == b"x"  # clocks differ a little
    assert unseal(sealed, now_s=9.0, ttl_s=10) is None


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 800)), max_size=80))
def test_memory_stays_within_its_bounds_and_keeps_what_was_used_last(operations: list[tuple[int, int]]) -> None:
    level = MemoryLevel(max_bytes=3000, max_entries=6, ttl_s=10)
    last: list[int] = []
    for number, size in operations:
        key = bytes([number]) * 32
        if size % 3 == 0 and level.get(key) is None:
            continue
        if size % 3:
            level.put(key, bytes(size))
        last = [other for other in last if other != number] + [number]
        assert level.num_bytes <= 3000
    kept = [number for number in last if level.get(bytes([number]) * 32) is not None]
    assert kept == last[len(last) - len(kept) :]
    assert len(kept) <= 6


def test_memory_forgets_what_is_old() -> None:
    clock = FakeClock()
    level = MemoryLevel(max_bytes=3000, max_entries=6, ttl_s=10, clock=clock)
    level.put(KEY, b"x")
    clock.now_s = 9.9
    assert level.get(KEY) == b"x"
    clock.now_s = 10.0
    assert level.get(KEY) is None
    assert level.num_bytes == 0


def files_in(directory: Path) -> list[Path]:
    return list(directory.glob("*/*"))


def disk(directory: Path, **changes: Any) -> DiskLevel:
    return DiskLevel(directory, **{"max_bytes": 1 << 20, "ttl_s": 100, "max_entry_bytes": 10_000, **changes})


async def test_disk_keeps_entries_over_a_restart(tmp_path: Path) -> None:
    first = disk(tmp_path)
    await first.start()
    assert await first.get(KEY) is None
    await first.put(KEY, b"data")
    assert await first.get(KEY) == b"data"
    await first.stop()
    second = disk(tmp_path)
    assert await second.get(KEY) is None  # it does not know yet
    await second.start()
    assert await second.get(KEY) == b"data"
    await second.stop()


async def test_disk_gives_up_what_was_used_least_lately(tmp_path: Path) -> None:
    level = disk(tmp_path, max_bytes=5 * 4096)
    await level.start()
    some = keys(6)
    for key in some[:5]:
        await level.put(key, bytes(3000))
    await level.get(some[0])
    await level.put(some[5], bytes(3000))
    assert [await level.get(key) is not None for key in some] == [True, False, True, True, True, True]
    assert len(files_in(tmp_path)) == 5
    await level.stop()
    for place, key in enumerate(some):  # what a restart goes by
        for path in files_in(tmp_path):
            if path.stem == key.hex():
                os.utime(path, (place, place))
    smaller = disk(tmp_path, max_bytes=2 * 4096)
    await smaller.start()
    assert [await smaller.get(key) is not None for key in some] == [False] * 4 + [True] * 2
    await smaller.stop()


@pytest.mark.parametrize("damage", [b"", b"rubbish", b"LMC1" + bytes(500), None])
async def test_a_damaged_file_is_no_entry_and_goes(tmp_path: Path, damage: bytes | None) -> None:
    level = disk(tmp_path)
    await level.start()
    await level.put(KEY, b"data")
    (path,) = files_in(tmp_path)
    if damage is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damage)
    assert await level.get(KEY) is None
    assert await level.get(KEY) is None
    if damage is not None:
        assert not path.exists()
        await level.put(KEY, b"again")
        assert await level.get(KEY) == b"again"
    await level.stop()


async def test_a_file_that_is_larger_than_any_entry_is_not_read_whole(tmp_path: Path) -> None:
    level = disk(tmp_path)
    await level.start()
    await level.put(KEY, b"data")
    (path,) = files_in(tmp_path)
    path.write_bytes(seal(bytes(100_000), time.time()))
    assert await level.get(KEY) is None
    await level.stop()


async def test_a_disk_that_cannot_be_written_keeps_nothing_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    directory.write_text("in the way")
    level = disk(directory)
    await level.start()
    for key in keys(3):
        await level.put(key, b"data")
        assert await level.get(key) is None
    assert len(caplog.records) == 1
    await level.stop()


async def test_unfinished_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "00").mkdir()
    unfinished = tmp_path / "00" / "x.part"
    unfinished.write_bytes(b"x")
    level = disk(tmp_path)
    await level.start()
    assert not unfinished.exists()
    await level.stop()


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"prompt_ids": [1, 2, 4]},
        {"prompt_ids": [1, 2]},
        {"engine": "vllm"},
        {"adapter": "a"},
        {"sampling": SamplingParams(max_tokens=99, temperature=0.0)},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, seed=1)},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, logprobs=1)},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, stop_token_ids=(5,))},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, logit_bias={5: 1.0})},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, grammar=Grammar(kind="json_object"))},
        {"embed": True},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, top_k=5)},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, top_p=0.5)},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, min_p=0.5)},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, repetition_penalty=1.5)},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, presence_penalty=0.5)},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, frequency_penalty=0.5)},
        {"sampling": SamplingParams(max_tokens=100, temperature=0.0, prompt_logprobs=0)},
        {"source": PromptSource(text="other engines make other tokens of it")},
        {"source": PromptSource(text="x", stop=("a",))},
        {"source": PromptSource(text="x", suffix="y")},
        {"source": PromptSource(messages=[], parameters={"tool_choice": "none"})},
        {
            "source": PromptSource(
                messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
            )
        },
    ],
)
def test_whatever_changes_the_answer_changes_the_key(other: dict[str, Any]) -> None:
    assert key_of(msgspec.structs.replace(REQUEST, **other)) != key_of(REQUEST)


def test_versions_and_scopes_have_keys_of_their_own() -> None:
    assert len({key_of(REQUEST), key_of(REQUEST, model_version="w"), key_of(REQUEST, scope="bert")}) == 3


def test_what_does_not_change_the_answer_does_not_change_the_key() -> None:
    biased = {
        order: msgspec.structs.replace(REQUEST, sampling=msgspec.structs.replace(SAMPLING, logit_bias=dict(order)))
        for order in (((1, 1.0), (2, 2.0)), ((2, 2.0), (1, 1.0)))
    }
    assert len({key_of(request) for request in biased.values()}) == 1
    assert key_of(msgspec.structs.replace(REQUEST, id="other", timeout_s=5.0)) == key_of(REQUEST)
    messages = [{"role": "user", "content": "x"}, {"content": "x", "role": "user"}]
    sources = [PromptSource(messages=[message]) for message in messages]
    assert len({key_of(msgspec.structs.replace(REQUEST, source=source)) for source in sources}) == 1


def test_without_ids_the_source_is_the_prompt() -> None:
    texts = [
        Request(id="r", model="m", prompt_ids=[], sampling=SAMPLING, source=PromptSource(text=text))
        for text in "ab"
    ]
    assert key_of(texts[0]) != key_of(texts[1])


@pytest.mark.parametrize(
    ("sampling", "repeatable"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 1.0}, False),
        ({"temperature": 1.0, "seed": 3}, True),
    ],
)
def test_only_repeatable_answers_are_kept(sampling: dict[str, Any], repeatable: bool) -> None:
    request = msgspec.structs.replace(REQUEST, sampling=SamplingParams(max_tokens=1, **sampling))
    assert is_repeatable(request) == repeatable
    assert not is_repeatable(msgspec.structs.replace(request, resumed_ids=[1]))


@pytest.mark.parametrize(
    ("part", "repeatable"),
    [
        ({"type": "text", "text": "see https://example.org"}, True),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, True),
        ({"type": "image_url", "image_url": {"url": "https://example.org/today.png"}}, False),
        ({"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}, True),
        ({"type": "file", "file": {"file_data": "AA==", "filename": "x"}}, True),
        ({"type": "file", "file": {"file_id": "file-1"}}, False),
    ],
)
def test_what_is_elsewhere_may_change(part: dict[str, Any], repeatable: bool) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [part]}, {"role": "assistant"}]
    request = msgspec.structs.replace(REQUEST, source=PromptSource(messages=messages))
    assert is_repeatable(request) == repeatable


class Reciting:
    """A generator that sends these chunks."""

    is_ready = True

    def __init__(self, chunks: list[TokenChunk]) -> None:
        self.chunks = chunks
        self.num_asked = 0

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        self.num_asked += 1
        for chunk in self.chunks:
            await asyncio.sleep(0)
            yield msgspec.structs.replace(chunk, request_id=request.id)


def tokens(number: int, *, reason: FinishReason | None = FinishReason.STOP) -> list[TokenChunk]:
    return [
        TokenChunk(
            request_id="",
            token_ids=[place],
            finish_reason=reason if place + 1 == number else None,
            usage=Usage(prompt_tokens=3, completion_tokens=place + 1, queue_s=1.0)
            if place in (0, number - 1)
            else None,
        )
        for place in range(number)
    ]


def cached(inner: Generator, *, max_entry_bytes: int = 10_000, scope: str = "anna") -> CachingGenerator:
    memory = MemoryLevel(max_bytes=1 << 20, max_entries=10, ttl_s=100)
    cache = Cache(memory, [], max_entry_bytes=max_entry_bytes)
    return CachingGenerator(
        inner,
        cache,
        model_version="v",
        scope=lambda: scope,
        decode=lambda ids: "".join(chr(ord("a") + i) for i in ids),
    )


async def ask(
    generator: CachingGenerator, request: Request = REQUEST, *, close_after: int | None = None, **use: bool
) -> tuple[list[TokenChunk], CacheUse]:
    chunks: list[TokenChunk] = []
    found = CacheUse(**use)
    with bound(found):
        answer = generator.generate(request)
        async for chunk in answer:
            chunks.append(chunk)
            if len(chunks) == close_after:
                break
        await answer.aclose()
    return chunks, found


def summed(chunks: list[TokenChunk]) -> tuple[Any, ...]:
    return (
        [token_id for chunk in chunks for token_id in chunk.token_ids],
        "".join(chunk.text or "" for chunk in chunks),
        "".join(chunk.reasoning for chunk in chunks),
        [call for chunk in chunks for call in chunk.tool_calls],
        [logprob for chunk in chunks for logprob in chunk.logprobs],
        chunks[0].prompt_logprobs,
        chunks[-1].finish_reason,
        [chunk.finish_reason for chunk in chunks[:-1] if chunk.finish_reason],
    )


logprobs = st.builds(TokenLogprob, token_id=st.integers(0, 9), logprob=st.just(-0.5), top=st.just([(1, -0.5)]))
call_deltas = st.builds(ToolCallDelta, index=st.just(0), arguments=st.text(max_size=3))
token_chunks = st.lists(
    st.integers(0, 5).flatmap(
        lambda number: st.builds(
            TokenChunk,
            request_id=st.just(""),
            token_ids=st.lists(st.integers(0, 9), min_size=number, max_size=number),
            logprobs=st.lists(logprobs, min_size=number, max_size=number),
        )
    ),
    min_size=1,
    max_size=60,
)
text_chunks = st.lists(
    st.builds(
        TokenChunk,
        request_id=st.just(""),
        text=st.text(max_size=5),
        reasoning=st.text(max_size=2),
        tool_calls=st.lists(call_deltas, max_size=1).map(tuple),
    ),
    min_size=1,
    max_size=60,
)


@given(token_chunks | text_chunks, st.sampled_from([None, [], [TokenLogprob(1, -0.5, [])]]))
@settings(deadline=None)
def test_an_answer_from_the_cache_is_the_answer(
    chunks: list[TokenChunk], prompt_logprobs: list[TokenLogprob] | None
) -> None:
    chunks[0] = msgspec.structs.replace(chunks[0], prompt_logprobs=prompt_logprobs)
    usage = Usage(prompt_tokens=3, completion_tokens=7)
    chunks[-1] = msgspec.structs.replace(chunks[-1], finish_reason=FinishReason.LENGTH, usage=usage)
    inner = Reciting(chunks)

    async def twice() -> None:
        generator = cached(inner)
        first, missed = await ask(generator)
        second, hit = await ask(generator, msgspec.structs.replace(REQUEST, id="other"))
        assert (missed.summary, hit.summary) == ("miss", "hit; level=memory")
        assert summed(second) == summed(first)
        assert second[-1].usage == usage
        assert {chunk.request_id for chunk in second} == {"other"}

    asyncio.run(twice())
    assert inner.num_asked == 1


async def test_pieces_from_the_cache_are_not_too_large() -> None:
    generator = cached(Reciting(tokens(1000)))
    await ask(generator)
    chunks, _ = await ask(generator)
    assert max(len(chunk.token_ids) for chunk in chunks) <= 32
    assert all(chunk.usage is None or chunk.usage.queue_s is None for chunk in chunks)


@pytest.mark.parametrize("close_after", [1, 4])
async def test_an_answer_that_was_closed_is_not_kept(close_after: int) -> None:
    inner = Reciting(tokens(5))
    generator = cached(inner)
    await ask(generator, close_after=close_after)
    _, again = await ask(generator)
    assert again.summary == "miss"


async def test_an_answer_whose_last_piece_was_all_that_was_read_is_kept() -> None:
    generator = cached(Reciting(tokens(5)))
    await ask(generator, close_after=5)
    _, again = await ask(generator)
    assert again.summary == "hit; level=memory"


async def test_an_answer_that_a_stop_string_ended_is_complete() -> None:
    request = msgspec.structs.replace(REQUEST, source=PromptSource(text="x", stop=("cd",)))
    generator = cached(Reciting(tokens(20)))
    first, _ = await ask(generator, request, close_after=4)  # a, b, c, d
    again, use = await ask(generator, request)
    assert use.summary == "hit; level=memory"
    assert [i for chunk in again for i in chunk.token_ids] == [0, 1, 2, 3]
    assert (again[-1].finish_reason, again[-1].usage) == (
        FinishReason.STOP,
        Usage(prompt_tokens=3, completion_tokens=4),
    )
    _, other = await ask(generator, msgspec.structs.replace(request, source=PromptSource(text="x", stop=("z",))))
    assert other.summary == "miss"
    assert len(first) == 4


async def test_an_answer_that_went_on_after_a_stop_string_is_not_complete() -> None:
    """Whoever read it has not ended it for that, but has left."""
    request = msgspec.structs.replace(REQUEST, source=PromptSource(text="x", stop=("cd",)))
    generator = cached(Reciting(tokens(20)))
    await ask(generator, request, close_after=6)
    _, again = await ask(generator, request)
    assert again.summary == "miss"


async def test_an_answer_that_fails_is_not_kept() -> None:
    class Failing(Reciting):
        async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
            async for chunk in super().generate(request):
                yield chunk
            raise RuntimeError

    generator = cached(Failing(tokens(3, reason=None)))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            await ask(generator)


async def test_a_long_answer_is_not_kept() -> None:
    inner = Reciting(tokens(100))
    generator = cached(inner, max_entry_bytes=100)
    await ask(generator)
    _, again = await ask(generator)
    assert (again.summary, inner.num_asked) == ("miss", 2)


async def test_clients_go_past_the_cache() -> None:
    inner = Reciting(tokens(3))
    generator = cached(inner)
    _, bypassed = await ask(generator, may_read=False, may_write=False)
    _, missed = await ask(generator)
    _, refreshed = await ask(generator, may_read=False)
    assert (bypassed.summary, missed.summary, refreshed.summary) == ("bypass", "miss", "bypass")
    assert inner.num_asked == 3


async def test_what_is_not_repeatable_is_not_looked_for() -> None:
    inner = Reciting(tokens(3))
    generator = cached(inner)
    request = msgspec.structs.replace(REQUEST, sampling=SamplingParams(max_tokens=9))
    for _ in range(2):
        _, use = await ask(generator, request)
        assert use.summary is None
    assert inner.num_asked == 2


async def test_entries_of_another_version_are_none() -> None:
    generator = cached(Reciting(tokens(3)))
    key = answer_key(REQUEST, model_version="v", scope="anna")
    for data in (b"", b"rubbish", msgspec.msgpack.encode([]), msgspec.msgpack.encode(tokens(2, reason=None))):
        generator._cache.put(key, data)
        _, use = await ask(generator, may_write=False)
        assert use.summary == "miss"


class SlowLevel:
    """A level of a test's own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: dict[bytes, bytes] = {}
        self.fails = False

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def get(self, key: bytes) -> bytes | None:
        return self.data.get(key)

    async def put(self, key: bytes, data: bytes) -> None:
        if self.fails:
            raise OSError
        self.data[key] = data


async def test_levels_fill_each_other() -> None:
    memory = MemoryLevel(max_bytes=1 << 20, max_entries=10, ttl_s=100)
    redis, on_disk = SlowLevel("redis"), SlowLevel("disk")
    cache = Cache(memory, [redis, on_disk], max_entry_bytes=1000)
    await cache.start()
    on_disk.data[KEY] = b"x"
    for level in ("disk", "memory"):
        found = await cache.get(KEY)
        assert found is not None
        assert (found.data, found.level) == (b"x", level)
    await asyncio.gather(*cache._tasks)
    assert redis.data == {KEY: b"x"}
    redis.fails = True
    cache.put(keys(1)[0], b"y")
    await asyncio.gather(*cache._tasks)
    assert on_disk.data[keys(1)[0]] == b"y"
    assert cache._pending_bytes == 0
    await cache.stop()


async def test_what_waits_to_be_written_is_bounded() -> None:
    memory = MemoryLevel(max_bytes=1 << 30, max_entries=1000, ttl_s=100)
    level = SlowLevel("disk")
    cache = Cache(memory, [level], max_entry_bytes=1 << 20)
    for number in range(40):
        cache.put(bytes([number]) * 32, bytes(1 << 20))
    assert cache._pending_bytes <= 16 << 20
    await asyncio.gather(*cache._tasks)
    assert len(level.data) == 16
    await cache.stop()


@pytest.mark.parametrize(
    "settings_",
    [
        {"memory_bytes": 0},
        {"memory_bytes": 100},
        {"disk_bytes": 100},
        {"disk_bytes": -1},
        {"redis_ttl_s": float("inf")},
        {"redis_url": "http://x"},
        {"memory_ttl_s": float("nan")},
    ],
)
def test_settings_that_cannot_be_are_named(settings_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings_))):
        CacheConfig(**settings_)
