"""Many requests at once: how they are timed."""

import itertools
from pathlib import Path

import pytest

from localmoe.bench.streams import StreamDriver, Streams, quantile
from localmoe.core.errors import EngineFaultError
from localmoe.engine.config import EngineConfig
from localmoe.engine.load import load_decoder
from localmoe.formats.store import Store
from localmoe.models.decoder import Decoder
from support.models import FakeExperts, kernels_under_test, make_engine

STREAMS = Streams(count=3, prompt_tokens=5, output_tokens=4, seconds=0.3, num_timed=6)


@pytest.fixture
def decoder(tiny_home: Path) -> Decoder:
    with Store.open(tiny_home / "models/olmoe/stores/f32.store") as store:
        return load_decoder(store, kernels_under_test())


def driver(decoder: Decoder) -> StreamDriver:
    return StreamDriver(make_engine(decoder, EngineConfig()), decoder.shape.vocab_size, STREAMS)


def test_a_saturated_engine_always_has_its_streams(decoder: Decoder) -> None:
    engine = make_engine(decoder, EngineConfig())
    steps = []
    found = StreamDriver(engine, decoder.shape.vocab_size, STREAMS).saturated(
        lambda: steps.append(engine.state().num_running + engine.state().num_waiting)
    )
    assert set(steps) == {3}
    assert found.tok_s > 0
    assert found.requests_s == pytest.approx(found.tok_s / 4)
    assert not engine.has_work


def test_first_tokens_are_timed_from_arrival(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes a second every time it is looked at, and arrivals some ten looks apart."""
    clock = itertools.count()
    monkeypatch.setattr("localmoe.bench.streams.time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("localmoe.bench.streams.time.sleep", lambda s: [next(clock) for _ in range(int(s) + 1)])
    waits_s = driver(decoder).times_to_first_token(0.1)
    assert len(waits_s) == STREAMS.num_timed
    # Up to the end of the step that was under way, and the look that follows each.
    assert all(0 < wait_s < 12 for wait_s in waits_s), waits_s


def test_a_request_that_fails_ends_it(decoder: Decoder) -> None:
    decoder.experts = FakeExperts(lambda routed, x: x.fill_(float("nan")))
    with pytest.raises(EngineFaultError, match="not finite"):
        driver(decoder).saturated(lambda: None)


def test_quantiles() -> None:
    assert quantile([float(i) for i in range(101)], 0.95) == pytest.approx(95)
