"""How long an engine takes for an answer, as learned from those it has given.

Two linear models: seconds to the first token, of the prompt tokens that it has to compute and of the answers under
way; and seconds between tokens, of the answers under way. Those of other engines of the model count apart, because
engines may share a machine. Both are fitted by least squares over what was observed, the latest counting most
(Haykin, Adaptive Filter Theory), with coefficients that are never negative (Lawson and Hanson, Solving Least Squares
Problems). A machine that gets busy makes everything slower at once, so the level of all times is followed apart from
the coefficients, and sooner; engines that share a processor share it, or the one that is not used would seem fast in
every busy minute.
"""

import math
from collections.abc import Sequence

import numpy as np

_FORGETTING = 0.97
_RIDGE = 1e-4
"""Of a feature's own weight: keeps a fit unique where features never varied, or only together."""
_NO_WEIGHT = 1e-12
_LEVEL_SMOOTHING = 0.05
"""A level takes more than half of a change, since it is quicker than the fits; with more, noise would sway it."""
_LEVEL_RETURN = 0.0005
"""What a level loses to this is made up for by the next observations, but for a third: half of a change is in the
weights after some 3500 observations, which is longer than a busy minute."""
_MAX_SURPRISE = 4.0
"""What took more than so many times as long as predicted counts less, or one stall would outweigh the rest."""
_SMALLEST_S = 1e-6
_UNSEEN_COST = 0.25
"""Of its share in what was measured, that each answer beyond is taken to cost the others. In one batch they cost
little where weights have to be read, and all of it where the processor is busy. What it is, is known when seen."""
_UNSEEN_COST_BESIDE = 1.0
"""Likewise of answers in another engine with the same processor: at least its share of that, and more where both
wait for their own threads."""
_PROMPT_SCALE = 1000.0
"""Prompt tokens are counted in thousands, so that features are of one size."""


class _Level:
    """How slow everything is now, as a factor.

    It and the weights of the engine that is used explain the same times, so between them it could wander anywhere,
    and with it what is predicted of engines at rest. So it follows the very errors that the fits balance, weighted
    alike: where those sum to nothing it stays, whatever the times' distribution. What is left of wandering is drawn
    back to 1.
    """

    def __init__(self) -> None:
        self._log = 0.0

    @property
    def factor(self) -> float:
        return math.exp(self._log)

    def follow(self, surprise: float) -> None:
        """Take in how many times as long as predicted something took."""
        error = (surprise - 1) / _doubt(surprise) ** 2
        self._log = (self._log + _LEVEL_SMOOTHING * error) * (1 - _LEVEL_RETURN)


def _doubt(surprise: float) -> float:
    """By how much an observation's weight is less than others'."""
    return max(1.0, surprise / _MAX_SURPRISE)


class Processor:
    """What engines compute with. Those that share one slow each other; when it is slow, it is so for all."""

    def __init__(self) -> None:
        self.first_level, self.between_level = _Level(), _Level()


class _LinearModel:
    """y = level · w·x."""

    def __init__(self, num_features: int, level: _Level) -> None:
        self._level = level
        self._weights = np.zeros(num_features)
        self._products = np.zeros((num_features, num_features))
        """Of features with each other, and below with the value: discounted sums over all that was observed."""
        self._targets = np.zeros(num_features)
        self.num_observed = 0

    def observe(self, features: Sequence[float], value: float) -> None:
        x, value = np.asarray(features), max(value, _SMALLEST_S)
        # The weights are those of a machine as it usually is.
        usual = value / self._level.factor
        # Relative errors count, or one answer of minutes would outweigh all short ones.
        expected = usual
        if self.num_observed:
            fitted = max(float(self._weights @ x), _SMALLEST_S)
            self._level.follow(usual / fitted)
            expected = fitted * _doubt(usual / fitted)
        x, target = x / expected, usual / expected
        self._products = _FORGETTING * self._products + np.outer(x, x)
        self._targets = _FORGETTING * self._targets + x * target
        self._weights = _solve(self._products, self._targets)
        self.num_observed += 1

    def predict(self, features: Sequence[float]) -> float:
        return max(_SMALLEST_S, self._level.factor * float(self._weights @ np.asarray(features)))


def _solve(products: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights that fit best, none of them negative: no work takes negative time, whatever few observations say."""
    products = products + np.diag(_RIDGE * products.diagonal() + _NO_WEIGHT)
    weights, used = np.zeros(len(targets)), np.arange(len(targets))
    while len(used):
        part = np.linalg.solve(products[np.ix_(used, used)], targets[used])
        if part.min() >= 0.0:
            weights[used] = part
            break
        used = np.delete(used, part.argmin())
    return weights


class SpeedModel:
    """One engine's speed.

    `num_running` are the answers that it has under way beside the one in question, `num_beside` those that the other
    engines of the model have which share its processor.
    """

    def __init__(self, processor: Processor) -> None:
        self._first = _LinearModel(4, processor.first_level)
        self._between = _LinearModel(3, processor.between_level)
        self._most_running = self._most_beside = 0.0
        """That its pace was measured with."""

    @property
    def is_known(self) -> bool:
        """Whether predictions mean anything."""
        return self._first.num_observed > 0 and self._between.num_observed > 0

    def observe_first(self, num_tokens: int, num_running: float, num_beside: float, took_s: float) -> None:
        """A first token came after `took_s`; `num_tokens` of its prompt and of those before it were computed."""
        self._first.observe(_first_features(num_tokens, num_running, num_beside), took_s)

    def observe_between(self, num_running: float, num_beside: float, token_s: float) -> None:
        """Tokens of an answer came `token_s` apart on average."""
        self._most_running = max(self._most_running, num_running)
        self._most_beside = max(self._most_beside, num_beside)
        self._between.observe((1.0, num_running, num_beside), token_s)

    def first_s(self, num_tokens: int, num_running: int, num_beside: int) -> float:
        """Seconds until the first token."""
        features = _first_features(num_tokens, num_running, num_beside)
        return self._beyond(num_running, num_beside) * self._first.predict(features)

    def token_s(self, num_running: int, num_beside: int) -> float:
        """Seconds between two tokens."""
        return self._beyond(num_running, num_beside) * self._between.predict((1.0, num_running, num_beside))

    def _beyond(self, num_running: int, num_beside: int) -> float:
        """How much longer it takes with more answers at once, here and beside, than were measured."""
        here = max(0.0, num_running - self._most_running) / (self._most_running + 1)
        beside = max(0.0, num_beside - self._most_beside) / (self._most_beside + 1)
        return 1.0 + _UNSEEN_COST * here + _UNSEEN_COST_BESIDE * beside


def _first_features(num_tokens: int, num_running: float, num_beside: float) -> tuple[float, ...]:
    thousands = num_tokens / _PROMPT_SCALE
    return (1.0, thousands, num_running, num_beside)
