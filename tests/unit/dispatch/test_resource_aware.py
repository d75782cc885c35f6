"""From NVML's numbers to the engine that gets a request, by a recording of four GPUs."""

import sys
import time
from collections.abc import Iterator

import pytest

from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.policy import Policy, make_policy
from localmoe.hardware.meter import HardwareMeter
from support.fake_nvml import FakeNvml
from support.replicas import load, make_replica


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def policy(nvml: FakeNvml) -> Iterator[Policy]:
    meter = HardwareMeter(interval_s=0.002)
    meter.start()
    yield make_policy(DispatchConfig(policy="resource_aware", prefix_affinity=False), meter)
    meter.stop()


def seen(nvml: FakeNvml, sample: int) -> None:
    """Return once a sample of the recording has been looked at."""
    nvml.sample = sample
    looks, deadline_s = nvml.num_looks, time.monotonic() + 5
    while nvml.num_looks < looks + 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_requests_follow_the_gpus(nvml: FakeNvml, policy: Policy) -> None:
    gpus = [make_replica(str(index), devices=[index]) for index in range(4)]
    chosen = []
    for sample in range(6):
        seen(nvml, sample)
        chosen.append(policy.choose(gpus, load()).name)
    # The second until it gets busy, then the third; when that is lost the second again, since the fourth is too hot
    # until it has cooled down.
    assert chosen == ["1", "1", "2", "2", "0", "3"]


def test_a_hot_gpu_is_left_out_while_there_is_another(nvml: FakeNvml, policy: Policy) -> None:
    lost, hot = make_replica("lost", devices=[2]), make_replica("hot", devices=[3])
    busy = make_replica("busy", devices=[0, 1])
    seen(nvml, 4)
    assert policy.choose([hot, busy], load()).name == "busy"
    assert policy.choose([hot, lost], load()).name == "lost"
    assert policy.choose([hot], load()).name == "hot"


def test_an_engine_is_as_used_as_its_most_used_gpu(nvml: FakeNvml, policy: Policy) -> None:
    pair, single = make_replica("pair", devices=[1, 2]), make_replica("single", devices=[0])
    seen(nvml, 0)
    assert policy.choose([single, pair], load()).name == "pair"
    seen(nvml, 4)
    assert policy.choose([single, pair], load()).name == "single"  # of the pair one is lost
