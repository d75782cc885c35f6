"""Every sampling parameter against its definition, on rows small enough to compute by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localmoe.core.plans import SequenceStep
from localmoe.core.request import SamplingParams
from localmoe.engine.sampler import adjust, filtered_probabilities, sample, score, uniform


def step(
    seed: int = 0, position: int = 1, history: tuple[list[int], list[int]] = ([0], []), **sampling: Any
) -> SequenceStep:
    return SequenceStep(
        sequence_id=0,
        token_ids=(0,),
        start=position - 1,
        block_table=(0,),
        samples=True,
        sampling=SamplingParams(max_tokens=1, **sampling),
        seed=seed,
        history=history,
        scores_prompt=False,
    )


def kept(probabilities: list[float], **sampling: Any) -> list[int]:
    logits = torch.tensor([probabilities]).log()
    out = filtered_probabilities(logits, [SamplingParams(max_tokens=1, **sampling)])[0]
    return out.nonzero().flatten().tolist()


def test_zero_temperature_takes_the_likeliest() -> None:
    assert sample(torch.tensor([[0.0, 3.0, 2.0]]), [step(temperature=0.0)]) == [1]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 100}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.5}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.9}, [0, 1, 2]),
        ({"temperature": 1e-6}, [0]),
    ],
)
def test_filters_keep_what_their_definitions_say(sampling: dict[str, Any], expected: list[int]) -> None:
    assert kept([0.5, 0.3, 0.15, 0.05], **sampling) == expected


def test_the_nucleus_is_exact_when_it_is_wider_than_the_candidates() -> None:
    size = 5000
    flat = torch.full((1, size), 1.0 / size).log() + torch.arange(size) * -1e-5
    out = filtered_probabilities(flat, [SamplingParams(max_tokens=1, top_p=0.9)])[0]
    exact = flat[0].softmax(0).sort(descending=True).values.double().cumsum(0)
    assert abs(int(out.count_nonzero()) - int((exact < 0.9).sum()) - 1) <= 2


def test_samples_follow_the_distribution() -> None:
    probabilities = [0.5, 0.25, 0.15, 0.1]
    draws = 4000
    logits = torch.tensor([probabilities]).log().repeat(draws, 1)
    tokens = sample(logits, [step(seed=7, position=i + 1) for i in range(draws)])
    for token, probability in enumerate(probabilities):
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(tokens.count(token) / draws - probability) < 4 * error


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    alone = sample(logits.clone(), [step(seed=11, position=5)])
    others = [step(seed=i, position=i + 1, top_p=0.7, temperature=2.0) for i in range(7)]
    batch = sample(torch.cat([torch.randn(7, 300), logits.clone()]), [*others, step(seed=11, position=5)])
    assert batch[-1:] == alone
    assert uniform(11, 5) != uniform(11, 6)
    assert uniform(11, 5) != uniform(12, 5)


def test_a_draw_of_zero_takes_no_excluded_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least uniform number, with likelier tokens behind excluded ones."""
    monkeypatch.setattr("localmoe.engine.sampler.uniform", lambda seed, position: 0.0)
    assert sample(torch.tensor([[-9.0, -9.0, 2.0, 1.0]]), [step(top_k=2)]) == [2]


def test_penalties_and_bias() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0])
    adjust(logits, SamplingParams(max_tokens=1, repetition_penalty=2.0), [0], [1])
    assert logits.tolist() == [1.0, -4.0, 1.0, 1.0]
    logits = torch.tensor([2.0, 2.0, 2.0])
    adjust(logits, SamplingParams(max_tokens=1, presence_penalty=0.5, frequency_penalty=0.25), [0], [1, 1, 2])
    assert logits.tolist() == [2.0, 1.0, 1.25]
    logits = torch.tensor([2.0, 2.0, 2.0])
    adjust(logits, SamplingParams(max_tokens=1, logit_bias={0: -100.0, 2: 1.5}), [0], [])
    assert logits.tolist() == [-98.0, 2.0, 3.5]


def test_scores_are_of_the_unmodified_distribution() -> None:
    logprob = score(torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), 1, 2)
    assert logprob.token_id == 1
    assert logprob.logprob == pytest.approx(math.log(0.25))
    assert [token for token, _ in logprob.top] == [0, 1]


@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=30),
    st.floats(0.01, 5),
    st.integers(0, 40),
    st.floats(0.001, 1),
    st.floats(0, 1),
    st.integers(0, 2**62),
)
def test_a_token_is_always_found_and_always_allowed(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = torch.tensor([values])
    params: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    allowed = filtered_probabilities(logits, [SamplingParams(max_tokens=1, **params)])[0]
    [token] = sample(logits.clone(), [step(seed=seed, **params)])
    assert allowed[token] > 0
