"""Placement that people ask for: an ordered list of rules, of which the first that matches an expert decides."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localmoe.core.errors import ConfigError
from localmoe.residency.policy import RetentionPolicy

Place = Literal["device", "ram", "disk", "auto"]
_WORTH: dict[str, dict[str, float]] = {
    "ram": {"device": 0.0, "ram": np.inf, "disk": -np.inf, "auto": 0.0},
    "device": {"device": np.inf, "ram": 0.0, "disk": 0.0, "auto": 0.0},
}
"""By memory and place; what is not infinite is up to the policy."""

_RULE = re.compile(r"\s*([\w.*?\[\]!-]+)\s*=\s*(\w+|[0-9]{1,3}%)\s*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Where some experts are kept."""

    pattern: str
    """Shell pattern of names such as `layers.3.experts.17`."""
    place: Place
    """`ram`: once read, kept in RAM or on a GPU, and given up only where no other can be; `disk`: the first to leave
    RAM once used; `device`: the last to leave a GPU, as `auto` where there is none; `auto`: as the policy finds."""

    most_percent: int = 100
    """Of RAM's slots, that all experts which follow this rule may hold together."""

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """From `PATTERN=PLACE` or `PATTERN=N%`. Raises ConfigError."""
        match = _RULE.fullmatch(text)
        if match is not None and match[2].endswith("%") and int(match[2][:-1]) <= 100:
            return cls(pattern=match[1], place="auto", most_percent=int(match[2][:-1]))
        if match is None or match[2] not in get_args(Place):
            raise ConfigError(
                f"placement rule {text!r:.100} is not PATTERN=PLACE, as layers.0.*=ram; places are "
                f"{', '.join(get_args(Place))}, and shares of RAM from 0% to 100%"
            )
        return cls(pattern=match[1], place=cast(Place, match[2]))


def with_rules(
    policy: RetentionPolicy,
    texts: Sequence[str],
    num_layers: int,
    num_experts: int,
    *,
    memory: Literal["ram", "device"] = "ram",
) -> RetentionPolicy:
    """A policy that follows the rules of one memory first; the same one if there are none.

    Raises:
        ConfigError: a rule cannot be read, or no expert has such a name.
    """
    if not texts:
        return policy
    rules, decides_LE = _decisions(texts, num_layers, num_experts)
    worth = np.array([*(_WORTH[memory][rule.place] for rule in rules), 0.0])
    return _Ruled(policy, worth[decides_LE])


@dataclass(frozen=True, kw_only=True)
class Quota:
    """The most that some experts may hold of RAM."""

    experts_LE: NDArray[np.bool_]
    """Which, [layers, experts]."""
    percent: int
    """Of the slots."""


def quotas(texts: Sequence[str], num_layers: int, num_experts: int) -> list[Quota]:
    """What rules limit; no expert is in two of them. Raises ConfigError, as `with_rules`."""
    rules, decides_LE = _decisions(texts, num_layers, num_experts)
    return [
        Quota(experts_LE=decides_LE == number, percent=rule.most_percent)
        for number, rule in enumerate(rules)
        if rule.most_percent < 100
    ]


def _decisions(texts: Sequence[str], num_layers: int, num_experts: int) -> tuple[list[Rule], NDArray[np.intp]]:
    """Rules, and which of them decides on each expert [layers, experts]: -1 where none does."""
    rules = [Rule.parse(text) for text in texts]
    names = [[f"layers.{layer}.experts.{e}" for e in range(num_experts)] for layer in range(num_layers)]
    decides_LE = np.full((num_layers, num_experts), -1, np.intp)
    for number in reversed(range(len(rules))):  # the first has the last word
        matches_LE = np.array([[fnmatchcase(name, rules[number].pattern) for name in row] for row in names])
        if not matches_LE.any():
            raise ConfigError(
                f"placement rule {texts[number].strip()} matches no expert; their names go from {names[0][0]} to "
                f"{names[-1][-1]}"
            )
        decides_LE[matches_LE] = number
    return rules, decides_LE


class _Ruled:
    """A policy whose values are overruled where `added` is infinite."""

    def __init__(self, policy: RetentionPolicy, added: NDArray[np.float64]) -> None:
        self._policy = policy
        self._ruled = np.isinf(added)
        self._added = added

    def observe(self, layer: int, experts: ArrayLike, *, prefill: bool) -> None:
        self._policy.observe(layer, experts, prefill=prefill)

    def values(self) -> NDArray[np.float64]:
        return np.where(self._ruled, self._added, self._policy.values())
