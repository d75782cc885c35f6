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

Place = Literal["ram", "disk", "auto"]

_RULE = re.compile(r"\s*([\w.*?\[\]!-]+)\s*=\s*(\w+)\s*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Where some experts are kept."""

    pattern: str
    """Shell pattern of names such as `layers.3.experts.17`."""
    place: Place
    """`ram`: once read, given up only where no other can be; `disk`: the first to go once used; `auto`: as the policy
    finds."""

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """From `PATTERN=PLACE`. Raises ConfigError."""
        match = _RULE.fullmatch(text)
        if match is None or match[2] not in get_args(Place):
            raise ConfigError(
                f"placement rule {text!r:.100} is not PATTERN=PLACE, as layers.0.*=ram; places are "
                f"{', '.join(get_args(Place))}"
            )
        return cls(pattern=match[1], place=cast(Place, match[2]))


def with_rules(
    policy: RetentionPolicy, texts: Sequence[str], num_layers: int, num_experts: int
) -> RetentionPolicy:
    """A policy that follows rules first; the same one if there are none.

    Raises:
        ConfigError: a rule cannot be read, or no expert has such a name.
    """
    if not texts:
        return policy
    rules = [Rule.parse(text) for text in texts]
    names = [[f"layers.{layer}.experts.{e}" for e in range(num_experts)] for layer in range(num_layers)]
    for rule in rules:
        if not any(fnmatchcase(name, rule.pattern) for row in names for name in row):
            raise ConfigError(
                f"placement rule {rule.pattern}={rule.place} matches no expert; their names go from {names[0][0]} to "
                f"{names[-1][-1]}"
            )
    worth = {"ram": np.inf, "disk": -np.inf, "auto": 0.0}
    added = np.array(
        [
            [worth[next((r.place for r in rules if fnmatchcase(name, r.pattern)), "auto")] for name in row]
            for row in names
        ]
    )
    return _Ruled(policy, added)


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
