"""When requests pass to an engine that fails."""

import pytest

from localmoe.dispatch.breaker import BreakerState, CircuitBreaker
from support.replicas import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breaker(clock: FakeClock) -> CircuitBreaker:
    return CircuitBreaker(max_failures=3, open_s=60.0, clock=clock)


def fail(breaker: CircuitBreaker, clock: FakeClock, times: int = 1) -> None:
    for _ in range(times):
        clock.now_s += 1.0
        breaker.begin()
        begun_s = clock.now_s
        clock.now_s += 1.0
        breaker.failed(begun_s)


def test_failures_in_a_row_open_it(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, clock, 2)
    assert (breaker.state, breaker.admits, breaker.reopens_in_s) == (BreakerState.CLOSED, True, 0.0)
    fail(breaker, clock)
    assert (breaker.state, breaker.admits, breaker.reopens_in_s) == (BreakerState.OPEN, False, 60.0)


def test_a_success_between_them_counts_anew(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, clock, 2)
    breaker.begin()
    breaker.succeeded()
    fail(breaker, clock, 2)
    assert breaker.state is BreakerState.CLOSED


def test_one_that_was_given_up_counts_for_nothing(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, clock, 2)
    breaker.begin()
    breaker.abandoned(clock.now_s)
    fail(breaker, clock)
    assert breaker.state is BreakerState.OPEN


def test_a_death_is_one_failure_however_many_it_ends(breaker: CircuitBreaker, clock: FakeClock) -> None:
    begun = [clock.now_s + second for second in range(10)]
    clock.now_s = begun[-1] + 5
    for begun_s in begun:
        breaker.begin()
        breaker.failed(begun_s)
        clock.now_s += 0.001  # they notice one after the other
    assert breaker.state is BreakerState.CLOSED
    fail(breaker, clock)
    assert breaker.state is BreakerState.CLOSED
    fail(breaker, clock)
    assert breaker.state is BreakerState.OPEN


def test_then_one_request_tries(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, clock, 3)
    clock.now_s += 59.9
    assert not breaker.admits
    assert breaker.reopens_in_s == pytest.approx(0.1)
    clock.now_s += 0.1
    assert (breaker.state, breaker.admits, breaker.reopens_in_s) == (BreakerState.HALF_OPEN, True, 0.0)
    breaker.begin()
    assert (breaker.state, breaker.admits) == (BreakerState.HALF_OPEN, False)
    breaker.succeeded()
    assert (breaker.state, breaker.admits) == (BreakerState.CLOSED, True)
    fail(breaker, clock, 2)
    assert breaker.state is BreakerState.CLOSED  # the count began anew


def test_a_try_whose_answer_begins_lets_others_in_but_not_for_long(
    breaker: CircuitBreaker, clock: FakeClock
) -> None:
    fail(breaker, clock, 3)
    late_s = clock.now_s - 0.5
    clock.now_s += 60.0
    breaker.begin()
    breaker.begun(late_s)  # of an answer from before it opened
    assert (breaker.state, breaker.admits) == (BreakerState.HALF_OPEN, False)
    breaker.begun(clock.now_s)
    assert (breaker.state, breaker.admits) == (BreakerState.CLOSED, True)
    fail(breaker, clock)
    assert breaker.state is BreakerState.OPEN


def test_one_failed_try_opens_it_again_for_as_long(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, clock, 3)
    clock.now_s += 60.0
    fail(breaker, clock)
    assert (breaker.state, breaker.reopens_in_s) == (BreakerState.OPEN, 60.0)
    clock.now_s += 60.0
    assert breaker.admits


def test_a_try_that_was_given_up_lets_another_one_try(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, clock, 3)
    clock.now_s += 60.0
    breaker.begin()
    breaker.abandoned(clock.now_s)
    assert (breaker.state, breaker.admits) == (BreakerState.HALF_OPEN, True)


def test_who_gives_up_from_before_leaves_the_try_alone(breaker: CircuitBreaker, clock: FakeClock) -> None:
    before_s = clock.now_s - 1.0
    fail(breaker, clock, 3)
    clock.now_s += 60.0
    breaker.begin()
    breaker.abandoned(before_s)
    assert not breaker.admits


def test_failures_of_requests_from_before_say_nothing_of_the_try(
    breaker: CircuitBreaker, clock: FakeClock
) -> None:
    before_s = clock.now_s
    fail(breaker, clock, 3)
    clock.now_s += 60.0
    breaker.begin()
    breaker.failed(before_s)
    assert (breaker.state, breaker.admits) == (BreakerState.HALF_OPEN, False)
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
