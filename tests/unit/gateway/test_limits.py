"""Requests and tokens per minute, and requests at a time."""

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from localmoe.core.current import Current
from localmoe.core.errors import (
    BackendUnavailableError,
    DeadlineExceededError,
    InvalidRequestError,
    LocalMoEError,
    RateLimitedError,
)
from localmoe.core.events import RequestFinished
from localmoe.core.identity import Principal, RateLimits, Role
from localmoe.core.request import Grammar, PromptSource, Request, SamplingParams
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.exchange import Exchange, bound, note_event
from localmoe.gateway.identity.access import AccessTable
from localmoe.gateway.limits.config import LimitsConfig, RoleLimits
from localmoe.gateway.limits.limiter import Limiter, Window, anthropic_headers
from localmoe.gateway.limits.metering import Metered, num_prompt_tokens

ALICE = Principal(id="alice", name="alice", role=Role.USER)
BOB = Principal(id="bob", name="bob", role=Role.USER)


class Clock:
    """Sliding windows begin at multiples of a minute."""

    def __init__(self) -> None:
        self.now_s = 60_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    class Time:
        @staticmethod
        def time() -> float:
            return clock.now_s

    monkeypatch.setattr("limits.aio.storage.memory.time", Time)
    return clock


def limiter_of(**limits: Any) -> Limiter:
    return Limiter(Current(GatewayConfig(limits=LimitsConfig(**limits))))


def finished(completion_tokens: int) -> RequestFinished:
    return RequestFinished(
        model="m",
        api="chat",
        outcome="stop",
        prompt_tokens=0,
        completion_tokens=completion_tokens,
        time_to_first_token_s=None,
        inter_token_s=(),
        queue_s=None,
        prefill_s=None,
        e2e_s=0.0,
    )


async def generate(
    limiter: Limiter, prompt: int, answer: int, *, most: int = 10_000, who: Principal = ALICE
) -> None:
    """A request from its beginning to its end."""
    exchange = Exchange(request_id="r", rule=AccessTable().rule("POST", "/v1/completions"), principal=who)
    exchange.ticket = await limiter.begin(who)
    try:
        with bound(exchange):
            async with Metered(prompt, most):
                note_event(finished(answer))
    finally:
        exchange.ticket.end()
        await limiter.drain()


async def remaining(limiter: Limiter, kind: str, who: Principal = ALICE) -> int:
    return int((await limiter.headers(who))[f"x-ratelimit-remaining-{kind}"])


async def test_requests_per_minute(clock: Clock) -> None:
    limiter = limiter_of(requests_per_minute=10)
    for place in range(10):
        assert await remaining(limiter, "requests") == 10 - place
        (await limiter.begin(ALICE)).end()
    with pytest.raises(RateLimitedError, match="10 requests a minute; 10 were in the last one") as refused:
        await limiter.begin(ALICE)
    assert refused.value.kind == "requests"
    (await limiter.begin(BOB)).end()  # has limits of his own
    wait_s = refused.value.retry_after_s
    clock.now_s += wait_s - 0.01
    with pytest.raises(RateLimitedError):
        await limiter.begin(ALICE)
    clock.now_s += 0.01
    (await limiter.begin(ALICE)).end()


async def test_a_minute_later_everything_is_free_again(clock: Clock) -> None:
    limiter = limiter_of(requests_per_minute=5)
    assert (await limiter.headers(ALICE))["x-ratelimit-reset-requests"] == "0s"
    for _ in range(5):
        (await limiter.begin(ALICE)).end()
    reset = (await limiter.headers(ALICE))["x-ratelimit-reset-requests"]
    clock.now_s += int(reset.removesuffix("s"))
    assert await remaining(limiter, "requests") == 5


@settings(max_examples=30, deadline=None)
@given(gaps_s=st.lists(st.floats(0, 20), min_size=20, max_size=80))
def test_what_is_told_to_wait_is_enough_and_not_too_much(gaps_s: list[float]) -> None:
    async def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock()
            patch.setattr("limits.aio.storage.memory.time", type("Time", (), {"time": lambda: clock.now_s}))
            limiter = limiter_of(requests_per_minute=4)
            admitted: list[float] = []
            for gap_s in gaps_s:
                clock.now_s += gap_s
                try:
                    (await limiter.begin(ALICE)).end()
                except RateLimitedError as error:
                    clock.now_s += error.retry_after_s or 0.0
                    (await limiter.begin(ALICE)).end()
                admitted.append(clock.now_s)
            # Never more than the limit in any of the windows that are counted.
            for window in {time_s // 60 for time_s in admitted}:
                assert sum(time_s // 60 == window for time_s in admitted) <= 4

    asyncio.run(run())


async def test_requests_at_a_time() -> None:
    limiter = limiter_of(requests_per_minute=0, concurrent_requests=2)
    first, second = await limiter.begin(ALICE), await limiter.begin(ALICE)
    with pytest.raises(RateLimitedError, match="2 of your requests are being answered") as refused:
        await limiter.begin(ALICE)
    assert refused.value.retry_after_s == 1.0
    (await limiter.begin(BOB)).end()
    first.end()
    first.end()  # once only
    third = await limiter.begin(ALICE)
    with pytest.raises(RateLimitedError):
        await limiter.begin(ALICE)
    second.end()
    third.end()


async def test_a_request_that_is_refused_takes_no_place() -> None:
    limiter = limiter_of(requests_per_minute=1, concurrent_requests=1)
    (await limiter.begin(ALICE)).end()
    for _ in range(3):
        with pytest.raises(RateLimitedError, match="requests a minute"):
            await limiter.begin(ALICE)


async def test_tokens_of_prompts_and_answers(clock: Clock) -> None:
    limiter = limiter_of(requests_per_minute=0, tokens_per_minute=1000)
    await generate(limiter, 100, 200)
    assert await remaining(limiter, "tokens") == 700
    await generate(limiter, 100, 50)
    assert await remaining(limiter, "tokens") == 550
    await generate(limiter, 500, 900)  # what it took too many is owed
    assert await remaining(limiter, "tokens") == 0
    with pytest.raises(RateLimitedError, match="1000 tokens a minute; 1850 were in the last one") as refused:
        await generate(limiter, 1, 0)
    assert refused.value.kind == "tokens"
    assert refused.value.retry_after_s > 60  # not only this window is full


@pytest.mark.parametrize(
    ("error", "num_tokens", "left"),
    [
        (BackendUnavailableError("gone"), 0, 1000),
        (InvalidRequestError("no"), 0, 1000),
        (InvalidRequestError("a grammar without an end"), 5, 895),
        (DeadlineExceededError("in a hurry"), 0, 900),
        (DeadlineExceededError("in a hurry"), 5, 895),
    ],
)
async def test_what_was_computed_is_not_given_back(
    clock: Clock, error: LocalMoEError, num_tokens: int, left: int
) -> None:
    limiter = limiter_of(requests_per_minute=0, tokens_per_minute=1000)
    exchange = Exchange(request_id="r", rule=AccessTable().rule("POST", "/v1/completions"), principal=ALICE)
    exchange.ticket = await limiter.begin(ALICE)
    with bound(exchange), contextlib.suppress(LocalMoEError):
        async with Metered(100, 10):
            note_event(finished(num_tokens))
            raise error
    exchange.ticket.end()
    await limiter.drain()
    assert await remaining(limiter, "tokens") == left


async def test_work_that_goes_on_keeps_its_place() -> None:
    limiter = limiter_of(requests_per_minute=0, concurrent_requests=1)
    ticket = await limiter.begin(ALICE)
    ticket.hold()
    ticket.end()
    with pytest.raises(RateLimitedError):
        await limiter.begin(ALICE)
    ticket.end()
    (await limiter.begin(ALICE)).end()


async def test_a_burst_counts_before_it_is_answered(clock: Clock) -> None:
    limiter = limiter_of(requests_per_minute=0, tokens_per_minute=10_000)
    for _ in range(20):  # answers have 400 tokens, as it learns
        await generate(limiter, 1, 400)
        clock.now_s += 120
    ticket = await limiter.begin(ALICE)
    admitted = 0
    with contextlib.suppress(RateLimitedError):
        while admitted < 100:  # none of them has answered yet
            await ticket.charge(1, 10_000)
            admitted += 1
    assert 24 <= admitted <= 30


async def test_what_an_answer_can_have_at_most_is_all_that_is_charged(clock: Clock) -> None:
    limiter = limiter_of(requests_per_minute=0, tokens_per_minute=10_000)
    await generate(limiter, 1, 4000)
    clock.now_s += 120
    ticket = await limiter.begin(ALICE)
    assert await ticket.charge(10, 5) == 15
    assert await ticket.charge(10, 10_000) == 10 + 800
    clock.now_s += 120
    assert await ticket.charge(9900, 10_000) == 10_000  # or it would never fit


async def test_a_prompt_that_never_fits_says_so() -> None:
    limiter = limiter_of(requests_per_minute=0, tokens_per_minute=100)
    with pytest.raises(RateLimitedError, match=r"the prompt has 101 tokens.*never fits") as refused:
        await generate(limiter, 101, 0)
    assert refused.value.retry_after_s is None


async def test_what_the_server_failed_on_costs_nothing(clock: Clock) -> None:
    limiter = limiter_of(requests_per_minute=0, tokens_per_minute=1000)
    exchange = Exchange(request_id="r", rule=AccessTable().rule("POST", "/v1/completions"), principal=ALICE)
    exchange.ticket = await limiter.begin(ALICE)
    with bound(exchange):
        with pytest.raises(BackendUnavailableError):
            async with Metered(300, 100):
                raise BackendUnavailableError("no engine")
        await limiter.drain()
        assert await remaining(limiter, "tokens") == 1000
        with pytest.raises(asyncio.CancelledError):  # the client left, after the prompt was computed perhaps
            async with Metered(300, 100):
                raise asyncio.CancelledError
        await limiter.drain()
    assert await remaining(limiter, "tokens") == 700


@pytest.mark.parametrize(
    ("own", "by_role", "for_all", "expected"),
    [
        (None, None, 100, 100),
        (None, 50, 100, 50),
        (7, 50, 100, 7),
        (0, 50, 100, None),
        (None, 0, 100, None),
        (None, None, 0, None),
        (500, None, 100, 500),
    ],
)
def test_whose_limit_counts(own: int | None, by_role: int | None, for_all: int, expected: int | None) -> None:
    config = LimitsConfig(requests_per_minute=for_all, user=RoleLimits(requests_per_minute=by_role))
    assert config.of(Role.USER, RateLimits(requests_per_minute=own)).requests_per_minute == expected
    assert config.of(Role.ADMIN, RateLimits()).requests_per_minute == (for_all or None)


async def test_accounts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.gateway.limits.limiter._MAX_ACCOUNTS", 10)
    limiter = limiter_of(requests_per_minute=0, concurrent_requests=1)
    held = await limiter.begin(ALICE)
    for place in range(100):
        (await limiter.begin(Principal(id=str(place), name="n", role=Role.USER))).end()
    assert len(limiter._accounts) <= 11
    with pytest.raises(RateLimitedError):  # who has something under way is not forgotten
        await limiter.begin(ALICE)
    held.end()


async def test_inner_requests_count_their_tokens_only(clock: Clock) -> None:
    limiter = limiter_of(requests_per_minute=1, tokens_per_minute=100, concurrent_requests=1)
    for _ in range(5):
        ticket = await limiter.begin(ALICE, is_inner=True)
        await ticket.charge(20, 0)
    assert await remaining(limiter, "requests") == 1
    with pytest.raises(RateLimitedError, match="tokens a minute"):
        await ticket.charge(20, 0)


def test_headers_in_the_words_of_anthropic() -> None:
    headers = {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "99",
        "x-ratelimit-reset-requests": "60s",
    }
    assert anthropic_headers(headers, 0.0) == {
        "anthropic-ratelimit-requests-limit": "100",
        "anthropic-ratelimit-requests-remaining": "99",
        "anthropic-ratelimit-requests-reset": "1970-01-01T00:01:00Z",
    }


@given(
    previous=st.integers(-1000, 10_000),
    previous_left_s=st.floats(0, 60),
    current=st.integers(-1000, 10_000),
    current_left_s=st.floats(60, 120),
    limit=st.integers(1, 10_000),
    data=st.data(),
)
def test_after_the_wait_there_is_room(
    previous: int, previous_left_s: float, current: int, current_left_s: float, limit: int, data: st.DataObject
) -> None:
    amount = data.draw(st.integers(1, limit))
    window = Window(previous, previous_left_s, current, current_left_s)
    wait_s = window.free_after_s(limit, amount)
    assert 0 <= wait_s <= 120.001
    if wait_s <= current_left_s - 60:  # the same window, later
        later = Window(previous, max(0.0, previous_left_s - wait_s), current, current_left_s - wait_s)
    else:
        later = Window(current, max(0.0, current_left_s - wait_s), 0, 120.0)
    assert later.used + amount <= limit


@pytest.mark.parametrize(
    "config", [{"requests_per_minute": -1}, {"redis_url": "http://x"}, {"redis_url": "localhost:6379"}]
)
def test_settings_that_are_refused(config: dict) -> None:
    with pytest.raises(ValueError, match=r"requests_per_minute is -1|redis_url must begin"):
        LimitsConfig(**config)


def test_the_password_of_redis_is_not_shown() -> None:
    assert "secret" not in repr(LimitsConfig(redis_url="redis://:secret@host"))


def test_what_an_answer_must_look_like_is_no_part_of_the_prompt() -> None:
    source = PromptSource(messages=[{"role": "user", "content": "hi"}])
    long = Grammar(kind="json_schema", source=" " * 40_000)
    asked = [
        Request(id="r", model="m", prompt_ids=[], sampling=SamplingParams(max_tokens=1), source=one)
        for one in (source, structs.replace(source, content_grammar=long))
    ]
    assert num_prompt_tokens(asked[:1]) == num_prompt_tokens(asked[1:])
