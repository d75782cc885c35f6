"""Rules about where experts are kept."""

import numpy as np
import pytest

from localmoe.core.errors import ConfigError
from localmoe.residency.placement import with_rules
from localmoe.residency.policy import Lru


def test_the_first_rule_that_matches_decides() -> None:
    policy = Lru(3, 4)
    policy.observe(0, [1], prefill=False)
    rules = ["layers.0.experts.2=auto", "layers.0.*=ram", " layers.*.experts.[13] = disk "]
    values = with_rules(policy, rules, 3, 4).values()
    inf = np.inf
    np.testing.assert_array_equal(values, [[inf, inf, 0, inf], [0, -inf, 0, -inf], [0, -inf, 0, -inf]])


def test_what_is_not_ruled_is_the_policys_and_it_goes_on_learning() -> None:
    policy = Lru(2, 2)
    ruled = with_rules(policy, ["layers.0.experts.0=ram"], 2, 2)
    ruled.observe(1, [1], prefill=False)
    assert ruled.values()[1, 1] == policy.values()[1, 1] > 0


def test_no_rules_leave_the_policy_alone() -> None:
    policy = Lru(2, 2)
    assert with_rules(policy, [], 2, 2) is policy


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("layers.0.*", "is not PATTERN=PLACE"),
        ("layers.0.*=gpu0", "places are device, ram, disk, auto"),
        ("=ram", "is not PATTERN=PLACE"),
        ("layers.0.*=ram=disk", "is not PATTERN=PLACE"),
        (
            "layers.2.*=ram",
            r"matches no expert; their names go from layers\.0\.experts\.0 to layers\.1\.experts\.1",
        ),
        ("x" * 1000, "is not PATTERN=PLACE"),
    ],
)
def test_rules_that_mean_nothing(rule: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        with_rules(Lru(2, 2), [rule], 2, 2)
    assert len(str(caught.value)) < 300


def test_a_device_has_rules_of_its_own() -> None:
    """What is kept in RAM need not be on the device, and what leaves RAM first may be."""
    policy = Lru(1, 4)
    policy.observe(0, [3], prefill=False)
    rules = ["layers.0.experts.0=device", "layers.0.experts.1=ram", "layers.0.experts.2=disk"]
    on_device = with_rules(policy, rules, 1, 4, memory="device").values()[0]
    in_ram = with_rules(policy, rules, 1, 4).values()[0]
    assert (on_device[0], in_ram[0]) == (np.inf, policy.values()[0, 0])
    assert on_device[1:].tolist() == policy.values()[0, 1:].tolist()
    assert in_ram[1:].tolist() == [np.inf, -np.inf, policy.values()[0, 3]]
