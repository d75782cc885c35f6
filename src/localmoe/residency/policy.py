"""What keeping an expert in memory is worth, judged by what the router has chosen so far.

A policy is told what every layer uses, in the order of execution, and has a value for each expert at any time. It
does not know what is in memory: who holds the experts gives up the one of the lowest value, which may well be one
that was read a moment ago.
"""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

PolicyName = Literal["lru", "lfu", "adaptive"]


class RetentionPolicy(Protocol):
    """Judges the experts [layers, experts] of a model."""

    def observe(self, layer: int, experts: ArrayLike, *, prefill: bool) -> None:
        """A layer uses these experts in the step at hand.

        In a step that has both, the prompts' tokens are told before the decoded ones.

        Args:
            experts: integers [tokens, experts each]: the tokens of a prompt in their order, or those being decoded,
                of which it matters only which experts they use: a list [n] will do. -1 is no expert.
        """
        ...

    def values(self) -> NDArray[np.float64]:
        """What keeping each expert [layers, experts] is worth; only the order counts. A view, to be read at once."""
        ...


class Lru:
    """Least recently used."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._last = np.zeros((num_layers, num_experts))
        self._clock = 0

    def observe(self, layer: int, experts: ArrayLike, *, prefill: bool) -> None:
        used = _named(experts)
        # Of an expert that is used twice, the later use is assigned last.
        self._last[layer, used] = np.arange(self._clock + 1, self._clock + 1 + len(used))
        self._clock += len(used)

    def values(self) -> NDArray[np.float64]:
        return self._last


class Lfu:
    """Least frequently used, where a use counts half after 128 steps. A chunk of a prompt is one step."""

    _DECAY = 0.5 ** (1 / 128)

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._counts = np.zeros((num_layers, num_experts))

    def observe(self, layer: int, experts: ArrayLike, *, prefill: bool) -> None:
        counts = self._counts[layer]
        counts *= self._DECAY
        counts[_named(experts)] += 1  # once, however many tokens use it

    def values(self) -> NDArray[np.float64]:
        return self._counts


class Adaptive:
    """How soon an expert will be used again, as far as two things tell that differ in what they know.

    How often it was used: a use n tokens ago weighs 1 / n, the sum of exponential decays of several half-lives. No
    single half-life suits all models and budgets; this weight has none.

    What followed in the like of now: a token's experts resemble those of some tokens of the past, and what was used
    after these is likelier to be used after it. The likeness of token n to now is how many experts the last pass
    through all layers shares with the same pass ending at n, so that it is known anew at every layer. It only adds:
    what is not used by the next token may well be by the one after.

    Both give the logarithm of a rate. A layer's turn comes once a step, and a use later in the step is worth a
    little less: layers that have just passed give way to those about to come.

    Rates that differ by less than a fifth are equal, since they are not known any better. It leaves whoever holds the
    experts a choice.

    A prompt's experts are many, and few of them are used again soon, so its tokens count less. They do not age what
    was decoded before: after the longest prompt, its uses stand beside those of decoding, which go on from there.
    """

    _HALF_LIVES_TOKENS = (1, 4, 16, 64, 256)
    _HISTORY_TOKENS = 128
    """Past tokens that are compared with now, and the last ones of a prompt that are looked at."""
    _PROMPT_WEIGHT = 0.2
    """Of a prompt's token, against a decoded one: what its use adds, and how far it ages those of prompts."""
    _LIKENESS_WEIGHT = 2.0
    """How much the logarithm of the rate grows where an expert followed all tokens like now, and no other."""
    _DELAY_COST = 0.5
    """How much it falls where the use comes a whole step later."""
    _MIN_RATE = 1e-4
    """Of an expert never used, in uses a token."""
    _RESOLUTION = 0.2
    """Of the logarithm of the rate."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        half_lives = np.array(self._HALF_LIVES_TOKENS, np.float64)
        self._num_layers = num_layers
        decays = 0.5 ** (1 / half_lives)
        self._decays = np.tile(decays, 2)[:, None]
        # So that an expert that every decoded token uses has a rate of 1.
        self._weights = np.tile(1 / half_lives / np.sum(decays / (1 - decays) / half_lives), 2)
        self._uses = np.zeros((num_layers, 2 * len(half_lives), num_experts))
        """Decayed sums of uses by decoded tokens, one for each half-life, then of uses by prompts."""
        self._history = np.zeros((num_layers, self._HISTORY_TOKENS, num_experts), np.float32)
        """1 where a token used an expert, the latest token first."""
        self._num_tokens = [0] * num_layers
        """In each layer's history."""
        self._shared = np.zeros((num_layers, self._HISTORY_TOKENS), np.float32)
        """Experts that the latest token of a layer shares with the one 1, 2, ... tokens before it."""
        self._likeness = np.zeros(self._HISTORY_TOKENS, np.float32)
        """Sum of `_shared` over all layers, where those not yet passed in this step have their latest token's."""
        self._values = np.full((num_layers, num_experts), -np.inf)
        self._step = 0
        self._layer = -1

    def observe(self, layer: int, experts: ArrayLike, *, prefill: bool) -> None:
        if layer < self._layer:
            self._step += 1
        self._layer = layer
        if prefill:
            self._see_prompt(layer, np.atleast_2d(experts))
        else:
            self._see_token(layer, _named(experts))
        log_rates = np.log(np.maximum(self._weights @ self._uses[layer], self._MIN_RATE))
        log_rates += self._LIKENESS_WEIGHT * self._followed(layer)
        # This layer's next turn is in the next step. One whose turn in this step is yet to come was last judged in
        # the step before, and has lost a step's cost less.
        log_rates -= self._DELAY_COST * (self._step + layer / self._num_layers)
        self._values[layer] = np.floor(log_rates / self._RESOLUTION)

    def values(self) -> NDArray[np.float64]:
        return self._values

    def _see_token(self, layer: int, experts: NDArray[np.integer]) -> None:
        history, uses = self._history[layer], self._uses[layer]
        used = np.zeros(history.shape[1], np.float32)
        used[experts] = 1
        uses[: len(uses) // 2] += used
        uses *= self._decays
        self._share(layer, history @ used)
        history[1:] = history[:-1]
        history[0] = used
        self._num_tokens[layer] = min(self._num_tokens[layer] + 1, len(history))

    def _see_prompt(self, layer: int, experts: NDArray[np.integer]) -> None:
        """Take in the last tokens of a prompt, of shape [tokens, experts each]."""
        history = self._history[layer]
        latest = experts[-len(history) :][::-1]
        num_tokens = len(latest)
        used = np.zeros((num_tokens, history.shape[1] + 1), np.float32)  # the last column is for -1
        used[np.arange(num_tokens)[:, None], latest] = 1
        used = used[:, :-1]
        uses = self._uses[layer, len(self._decays) // 2 :]
        decays = self._decays[len(uses) :]
        uses *= decays ** (self._PROMPT_WEIGHT * num_tokens)
        uses += self._PROMPT_WEIGHT * decays ** (1 + self._PROMPT_WEIGHT * np.arange(num_tokens)) @ used
        history[num_tokens:] = history[: len(history) - num_tokens].copy()
        history[:num_tokens] = used
        self._share(layer, np.append(history[1:] @ history[0], np.float32(0)))
        self._num_tokens[layer] = min(self._num_tokens[layer] + num_tokens, len(history))

    def _share(self, layer: int, shared: NDArray[np.float32]) -> None:
        self._likeness += shared - self._shared[layer]
        self._shared[layer] = shared

    def _followed(self, layer: int) -> NDArray[np.float32]:
        """From 0 to 1 for each expert [experts]: how far it followed tokens like now rather than those unlike now.

        The token after the one of lag n + 1 is the one of lag n, in row n of the history.
        """
        num_pairs = self._num_tokens[layer] - 1
        followed = np.zeros(self._history.shape[2], np.float32)
        if num_pairs > 0:
            likeness = self._likeness[:num_pairs]
            likeness = likeness - likeness.sum() / num_pairs
            likeness *= 2 / (np.abs(likeness).sum() + 1e-6)
            np.matmul(likeness, self._history[layer, :num_pairs], out=followed)
        return np.maximum(followed, 0, out=followed)


def _named(experts: ArrayLike) -> NDArray[np.integer]:
    """All that are named, flat."""
    flat: NDArray[np.integer] = np.ravel(experts)
    return flat[flat >= 0]


_POLICIES: dict[PolicyName, type[Lru | Lfu | Adaptive]] = {"lru": Lru, "lfu": Lfu, "adaptive": Adaptive}


def retention_policy(name: PolicyName, num_layers: int, num_experts: int) -> RetentionPolicy:
    """The policy of this name, for a model of this size."""
    return _POLICIES[name](num_layers, num_experts)
