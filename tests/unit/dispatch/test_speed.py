"""What is learned of an engine's speed, and how soon."""

import numpy as np
import pytest

from localmoe.dispatch.speed import Processor, SpeedModel

PLACES = [(tokens, running, beside) for tokens in (500, 1000, 3000) for running in (0, 3, 7) for beside in (0, 4)]


def first_s(tokens: int, running: int, beside: int) -> float:
    return 0.05 + 0.4e-3 * tokens + 0.03 * running + 0.01 * beside


class Teacher:
    """Shows a model an engine whose times are those of the law above, but for noise."""

    def __init__(self, *, seed: int = 0, noise: float = 0.05, beside: int = 8) -> None:
        self.model = SpeedModel(Processor())
        self._rng = np.random.default_rng(seed)
        self._noise = noise
        self._beside = beside

    def show(self, count: int, slower: float = 1.0) -> None:
        for _ in range(count):
            tokens, running = int(self._rng.integers(16, 4000)), int(self._rng.integers(0, 8))
            beside = int(self._rng.integers(0, self._beside + 1))
            noise = 1 + self._noise * self._rng.standard_normal()
            self.model.observe_first(tokens, running, beside, slower * first_s(tokens, running, beside) * noise)
            self.model.observe_between(running, beside, slower * (0.02 + 0.004 * running) * noise)

    def errors(self, slower: float = 1.0) -> list[float]:
        return [abs(self.model.first_s(*place) / (slower * first_s(*place)) - 1) for place in PLACES]


@pytest.mark.parametrize("seed", range(10))
def test_a_linear_law_is_learned_from_thirty_answers(seed: int) -> None:
    teacher = Teacher(seed=seed)
    assert not teacher.model.is_known
    teacher.show(30)
    assert teacher.model.is_known
    # The best unbiased estimate comes to 0.06 on the worst of these seeds.
    assert np.mean(teacher.errors()) < 0.10
    assert teacher.model.first_s(1000, 3, 4) == pytest.approx(first_s(1000, 3, 4), rel=0.1)
    for running in (0, 3, 7):
        assert teacher.model.token_s(running, 4) == pytest.approx(0.02 + 0.004 * running, rel=0.1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_fast_engines_and_slow_ones_are_learned_alike(scale: float) -> None:
    teacher = Teacher(noise=0.0)
    teacher.show(30, slower=scale)
    assert max(teacher.errors(slower=scale)) < 0.01


def test_nothing_takes_negative_time() -> None:
    """Noise as large as the times themselves, and places that were never seen."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        model = SpeedModel(Processor())
        for _ in range(int(rng.integers(1, 30))):
            model.observe_first(int(rng.integers(0, 100)), int(rng.integers(0, 3)), 0, float(rng.exponential(0.1)))
            model.observe_between(int(rng.integers(0, 3)), 0, float(rng.exponential(0.1)))
        places = [(tokens, running, beside) for tokens in (0, 10_000) for running in (0, 50) for beside in (0, 50)]
        assert all(0 < model.first_s(*place) < 1e4 for place in places)
        assert all(0 < model.token_s(*place[1:]) < 1e4 for place in places)
        first = [model.first_s(tokens, 1, 1) for tokens in range(0, 5000, 100)]
        assert first == sorted(first)  # more to do never takes less


@pytest.mark.parametrize("num_before", [20, 300])
@pytest.mark.parametrize("slower", [0.3, 3.0, 10.0])
def test_a_change_is_noticed_within_thirty_answers(slower: float, num_before: int) -> None:
    """However much was learned before, and though some of it never varied."""
    teacher = Teacher(beside=0)
    teacher.show(num_before)
    teacher.show(30, slower=slower)
    predicted = teacher.model.first_s(1000, 3, 0) / first_s(1000, 3, 0)
    assert predicted == pytest.approx(slower, rel=0.3)
    teacher.show(70, slower=slower)
    predicted = teacher.model.first_s(1000, 3, 0) / first_s(1000, 3, 0)
    assert predicted == pytest.approx(slower, rel=0.1)


@pytest.mark.parametrize("outlier", [0.01, 100.0])
def test_one_odd_answer_changes_little(outlier: float) -> None:
    teacher = Teacher()
    teacher.show(50)
    teacher.show(1, slower=outlier)
    assert teacher.model.first_s(1000, 3, 4) == pytest.approx(first_s(1000, 3, 4), rel=0.3)
    teacher.show(20)
    assert np.mean(teacher.errors()) < 0.10


def test_one_answer_says_something_already() -> None:
    model = SpeedModel(Processor())
    model.observe_first(1000, 0, 0, 20.0)
    assert not model.is_known
    model.observe_between(0, 0, 0.5)
    assert model.is_known
    assert model.first_s(1000, 0, 0) == pytest.approx(20.0, rel=0.01)
    assert model.token_s(0, 0) == pytest.approx(0.5, rel=0.01)


def test_times_that_no_clock_resolves() -> None:
    model = SpeedModel(Processor())
    for _ in range(50):
        model.observe_first(0, 0, 0, 0.0)
        model.observe_between(0, 0, 0.0)
    assert 0 < model.first_s(1000, 5, 5) < 1e-3
    assert 0 < model.token_s(5, 5) < 1e-3


def test_of_more_at_once_than_was_measured_little_is_feared() -> None:
    """Batching may bring much or nothing; feared to bring nothing, a first burst would be turned away."""
    model = SpeedModel(Processor())
    for _ in range(3):
        model.observe_first(10, 0, 0, 1.0)
        model.observe_between(0, 0, 0.1)
    assert model.token_s(0, 0) == pytest.approx(0.1, rel=0.01)
    assert 0.3 < model.token_s(20, 0) < 0.8
    model.observe_between(20, 0, 0.2)
    assert model.token_s(20, 0) < 0.3


def used_and_resting(rng: np.random.Generator) -> tuple[SpeedModel, SpeedModel]:
    """Two engines of one processor, of 10 ms and 30 ms a token."""
    processor = Processor()
    used, resting = SpeedModel(processor), SpeedModel(processor)
    for model, token_s in ((resting, 0.03), (used, 0.01)):
        for _ in range(50):
            model.observe_between(0, 0, token_s * rng.lognormal(0.0, 0.1))
    return used, resting


def scattered(shape: str, rng: np.random.Generator) -> float:
    """Of mean 1 or a little more."""
    match shape:
        case "held up":  # by others' prompts
            return 3.5 if rng.random() < 0.05 else 1.0
        case "stalls":
            return 20.0 if rng.random() < 0.02 else 1.0
        case "gamma":
            return rng.gamma(2.0, 0.5)
        case _:
            spread = float(shape)
            return rng.lognormal(-(spread**2) / 2, spread)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", ["0.2", "0.5", "0.8", "gamma", "held up", "stalls"])
def test_what_is_predicted_of_an_engine_at_rest_stays(seed: int, shape: str) -> None:
    """However long another one is used, and however its times scatter."""
    rng = np.random.default_rng(seed)
    used, resting = used_and_resting(rng)
    for _ in range(5000):
        num_running = int(rng.integers(0, 6))
        used.observe_between(num_running, 0, (0.01 + 0.002 * num_running) * scattered(shape, rng))
    assert resting.token_s(0, 0) == pytest.approx(0.03, rel=0.35)
    assert resting.token_s(0, 0) > 1.7 * used.token_s(0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_an_engine_at_rest_is_as_slow_as_its_processor(seed: int) -> None:
    """Or it would be given the requests of every busy minute, and of the quiet that follows one."""
    rng = np.random.default_rng(seed)
    used, resting = used_and_resting(rng)

    def use(count: int, slower: float) -> float:
        for _ in range(count):
            used.observe_between(0, 0, 0.01 * slower * rng.lognormal(0.0, 0.2))
        return resting.token_s(0, 0) / 0.03

    assert 1.6 < use(30, 3.0) < 3.2
    assert 1.5 < use(1500, 3.0) < 3.2
    assert 0.7 < use(30, 1.0) < 1.3
    assert 0.7 < use(500, 1.0) < 1.3
