"""Engines as policies see them: a load and a speed, and nothing behind."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from localmoe.backends.scripted import ScriptedBackend
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.policy import Load
from localmoe.dispatch.replica import Replica
from localmoe.dispatch.speed import Processor


class FakeClock:
    """Goes on when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make_replica(
    name: str,
    *,
    running: int = 0,
    capacity: int = 8,
    token_s: Callable[[int], float] | None = None,
    first_s: Callable[[int, int], float] = lambda tokens, running: 1e-3 * tokens,
    devices: Sequence[int] = (),
    processor: Processor | None = None,
    clock: Callable[[], float] = FakeClock(),  # noqa: B008 - nobody moves it
) -> Replica:
    """An engine.

    Args:
        running: answers under way.
        token_s: seconds between tokens, of answers under way beside; None: nothing is known of its speed.
        first_s: to the first token, of the tokens of the prompt and answers under way beside.
    """
    backend = ScriptedBackend([], capacity=capacity)
    replica = Replica(
        name=name,
        kind=name,
        backend=backend,
        config=DispatchConfig(),
        devices=devices,
        processor=processor,
        clock=clock,
    )
    replica.num_running = running
    if token_s is not None:
        for turn in range(60):
            beside, tokens = turn % 5, 40 + turn * 37 % 2000
            elsewhere = turn * 5 % 7  # which changes nothing
            replica.speed.observe_first(tokens, beside, elsewhere, first_s(tokens, beside))
            replica.speed.observe_between(beside, elsewhere, token_s(beside))
    return replica


def load(
    prompt: int = 100,
    expected: float = 100.0,
    known: Mapping[str, int] | None = None,
    beside: Mapping[str, int] | None = None,
) -> Load:
    return Load(
        num_prompt_tokens=prompt,
        expected_tokens=expected,
        known_tokens=known or {},
        num_beside=defaultdict(int, beside or {}),
    )
