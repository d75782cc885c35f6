"""Silence that counts, and silence that does not."""

from localmoe.backends.hang_clock import HangClock
from support.replicas import FakeClock


def test_silence_counts_while_somebody_waits() -> None:
    clock = FakeClock()
    hang_clock = HangClock(clock)
    assert hang_clock.silent_s == 0.0
    hang_clock.begin()
    clock.now_s += 2.0
    hang_clock.begin()
    clock.now_s += 3.0
    assert hang_clock.silent_s == 5.0
    hang_clock.end()
    assert hang_clock.silent_s == 5.0
    hang_clock.heard()
    clock.now_s += 1.0
    assert hang_clock.silent_s == 1.0


def test_those_who_give_up_one_after_the_other_add_up() -> None:
    clock = FakeClock()
    hang_clock = HangClock(clock)
    for _ in range(3):
        hang_clock.begin()
        clock.now_s += 2.0
        hang_clock.end()
        clock.now_s += 1000.0  # nobody waits
        assert hang_clock.silent_s == 0.0
    hang_clock.begin()
    assert hang_clock.silent_s == 6.0


def test_an_engine_that_is_heard_begins_anew() -> None:
    clock = FakeClock()
    hang_clock = HangClock(clock)
    hang_clock.begin()
    clock.now_s += 2.0
    hang_clock.end()
    hang_clock.heard()
    hang_clock.begin()
    clock.now_s += 1.0
    assert hang_clock.silent_s == 1.0
