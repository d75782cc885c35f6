"""The step loop over a real small model: scoring, faults and who they touch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe.core.errors import InvalidRequestError
from localmoe.core.protocols import Routed
from localmoe.core.request import Request, RequestFailed, SamplingParams, TokenChunk, TokenLogprob
from localmoe.engine.budget import SCORED_ROWS
from localmoe.engine.config import EngineConfig
from localmoe.engine.engine import Engine
from localmoe.engine.load import load_decoder, warm_up
from localmoe.formats.store import Store
from localmoe.models.decoder import Decoder
from support.models import FakeExperts, greedy, kernels_under_test, make_engine, run


@pytest.fixture
def decoder(tiny_home: Path) -> Decoder:
    with Store.open(tiny_home / "models/distinct-experts/stores/f32.store") as store:
        return load_decoder(store, kernels_under_test())


def outputs(engine: Engine, *requests: Request) -> list[TokenChunk | RequestFailed]:
    for request in requests:
        engine.add(request)
    found = []
    while engine.has_work:
        found += engine.step()
    return found


def sampled(name: str, prompt_ids: list[int], max_tokens: int, **fields: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **fields)
    return Request(id=name, model="test", prompt_ids=prompt_ids, sampling=sampling)


@pytest.mark.parametrize("chunk_tokens", [5, 512])
def test_scoring_a_sequence_gives_what_generating_it_reported(decoder: Decoder, chunk_tokens: int) -> None:
    prompt = [5, 6, 7, 8]
    # Scores are of the model's own distribution, whatever a penalty made of it.
    request = sampled("a", prompt, 20, temperature=0.0, logprobs=3, repetition_penalty=1.3)
    chunks = outputs(make_engine(decoder, EngineConfig()), request)
    generated = [logprob for chunk in chunks if isinstance(chunk, TokenChunk) for logprob in chunk.logprobs]
    sequence = prompt + [logprob.token_id for logprob in generated]
    engine = make_engine(decoder, EngineConfig(max_num_batched_tokens=chunk_tokens))
    run(engine, [greedy("fills the prefix cache", sequence, 1)])
    [chunk] = outputs(engine, sampled("b", sequence, 0, prompt_logprobs=3))
    assert isinstance(chunk, TokenChunk)
    scored: list[TokenLogprob] = chunk.prompt_logprobs or []
    assert [score.token_id for score in scored] == sequence[1:]
    for score, reported in zip(scored[len(prompt) - 1 :], generated, strict=True):
        assert score.logprob == pytest.approx(reported.logprob, abs=1e-4)
        assert [token for token, _ in score.top] == [token for token, _ in reported.top]


def test_a_penalty_beyond_all_numbers_fails_its_own_request_only(decoder: Decoder) -> None:
    engine = make_engine(decoder, EngineConfig())
    found = outputs(
        engine,
        sampled("wild", [5, 6], 4, repetition_penalty=1e-300),
        sampled("cold", [5, 6], 4, temperature=1e-50),
        greedy("good", [5, 6], 4),
    )
    assert [o.request_id for o in found if isinstance(o, RequestFailed)] == ["wild"]
    tokens = {
        name: [t for o in found if isinstance(o, TokenChunk) and o.request_id == name for t in o.token_ids]
        for name in ("cold", "good")
    }
    assert tokens["cold"] == tokens["good"]
    assert len(tokens["good"]) == 4
    assert engine.state().kv_blocks_used == 0


def test_numbers_that_are_not_finite_do_not_outlive_their_request(decoder: Decoder) -> None:
    engine = make_engine(decoder, EngineConfig(), num_blocks=2)
    clean = run(engine, [greedy("before", [5] * 20, 4)])["before"]
    experts = decoder.experts
    decoder.experts = FakeExperts(lambda routed, x: x.fill_(float("nan")))
    assert all(isinstance(output, RequestFailed) for output in outputs(engine, greedy("bad", [6] * 20, 4)))
    decoder.experts = experts
    assert run(engine, [greedy("after", [5] * 20, 4)])["after"] == clean
    assert (
        run(engine, [greedy("short", [7], 4)])["short"]
        == run(make_engine(decoder, EngineConfig()), [greedy("short", [7], 4)])["short"]
    )


def test_a_step_that_raises_fails_its_requests_and_the_engine_lives(decoder: Decoder) -> None:
    engine = make_engine(decoder, EngineConfig(max_num_seqs=1))
    experts = decoder.experts

    def broken(routed: Routed[torch.Tensor], x_TD: torch.Tensor) -> None:
        decoder.experts = experts
        raise RuntimeError("out of memory")

    decoder.experts = FakeExperts(broken)
    found = outputs(engine, greedy("unlucky", [5], 2), greedy("next", [5], 2))
    assert found[0] == RequestFailed(request_id="unlucky", message="the engine failed: out of memory")
    assert all(isinstance(output, TokenChunk) for output in found[1:])
    assert engine.state().kv_blocks_used == 0


def test_a_model_that_cannot_compute_does_not_become_ready(decoder: Decoder) -> None:
    decoder.experts = FakeExperts(lambda routed, x: x.fill_(float("inf")))
    with pytest.raises(Exception, match="the model cannot compute"):
        warm_up(make_engine(decoder, EngineConfig()))


@pytest.mark.parametrize("prompt_ids", [[], [-1], [1 << 20], [5] * 1020])
def test_what_the_model_or_cache_does_not_have_stops_at_the_door(decoder: Decoder, prompt_ids: list[int]) -> None:
    engine = make_engine(decoder, EngineConfig())
    with pytest.raises(InvalidRequestError):
        engine.add(greedy("a", prompt_ids, 10))
    assert not engine.has_work


def test_scores_of_a_long_prompt_take_the_logits_of_some_rows_at_a_time(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = sampled("a", [5 + token % 50 for token in range(SCORED_ROWS + 20)], 0, prompt_logprobs=1)
    sizes: list[int] = []
    logits = decoder.logits

    def noted(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(decoder, "logits", noted)
    [chunk] = outputs(make_engine(decoder, EngineConfig()), request)
    assert sizes == [SCORED_ROWS, 19]
    [expected] = outputs(make_engine(decoder, EngineConfig(max_num_batched_tokens=16)), request)
    assert isinstance(chunk, TokenChunk)
    assert isinstance(expected, TokenChunk)
    assert chunk.prompt_logprobs == expected.prompt_logprobs
