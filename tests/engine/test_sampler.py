"""Every sampling parameter against its definition, on rows small enough to compute by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localmoe.core.plans import SequenceStep
from localmoe.core.request import SamplingParams
from localmoe.engine.sampler import Draw, adjust, draws_of, mask_of, refuse, sample, score, settings, uniform
from localmoe.kernels.base import Kernels
from localmoe.kernels.reference import ReferenceKernels, filtered_probabilities
from support.models import kernels_under_test


def draw(
    seed: int = 0, position: int = 1, history: tuple[list[int], list[int]] = ([0], []), **sampling: Any
) -> Draw:
    return Draw(sampling=SamplingParams(max_tokens=1, **sampling), seed=seed, position=position, history=history)


@pytest.fixture(params=["reference", "kernels under test"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return ReferenceKernels(1) if request.param == "reference" else kernels_under_test()


def kept(kernels: Kernels, probabilities: list[float], **sampling: Any) -> list[int]:
    """Every token that some uniform number draws."""
    count = 500
    one = settings([draw(**sampling)] * count)
    uniforms = np.linspace(0, 1, count, endpoint=False)
    logits = torch.tensor([probabilities]).log().repeat(count, 1)
    return sorted(set(kernels.draw(logits, replace(one, uniforms_S=uniforms))))


@pytest.mark.parametrize("made_for", ["cpu", "cuda"])
@pytest.mark.parametrize("num_tokens", [1, 8, 100, 257])
def test_masks_keep_exactly_what_is_allowed(made_for: str, num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    allowed_GV = rng.integers(0, 2, (2, num_tokens)).astype(bool)
    # As they come: of whole words, with bits for ids that the model does not have.
    num_bits = 32 * (num_tokens // 32 + 1)
    padded = np.pad(allowed_GV, ((0, 0), (0, num_bits - num_tokens)), constant_values=True)
    logits_SV = torch.randn(4, num_tokens)
    expected = logits_SV.clone()
    masks = {}
    for row, bits, allowed_V in zip((3, 1), padded, allowed_GV, strict=True):
        packed = np.packbits(bits, bitorder="little").tobytes()
        masks[row] = mask_of(packed, num_tokens, torch.device(made_for))
        expected[row, torch.from_numpy(~allowed_V)] = -1e30
    refuse(logits_SV, masks)
    assert torch.equal(logits_SV, expected)


def test_zero_temperature_takes_the_likeliest(kernels: Kernels) -> None:
    assert sample(kernels, torch.tensor([[0.0, 3.0, 2.0]]), [draw(temperature=0.0)]) == [1]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 100}, [0, 1, 2, 3]),
        ({"top_p": 0.49}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.5}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.9}, [0, 1, 2]),
        ({"temperature": 1e-4}, [0]),
    ],
)
def test_filters_keep_what_their_definitions_say(
    kernels: Kernels, sampling: dict[str, Any], expected: list[int]
) -> None:
    assert kept(kernels, [0.5, 0.3, 0.15, 0.05], **sampling) == expected


@pytest.mark.parametrize(
    "sampling", [{"top_p": 0.9}, {"top_k": 3000}, {"top_k": 3000, "top_p": 0.5}, {"min_p": 0.97}]
)
def test_wide_filters_cut_at_the_right_token(kernels: Kernels, sampling: dict[str, Any]) -> None:
    """Among nearly equal tokens, the last uniform number draws the last token that passes."""
    flat = torch.arange(5000) * -1e-5
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    one = settings([draw(**sampling)])
    expected = filtered_probabilities(flat[None], one)[0]
    for row, passing in ((flat, expected), (flat[order], expected[order])):
        last = kernels.draw(row[None].contiguous(), replace(one, uniforms_S=np.array([1 - 1e-12])))
        assert abs(last[0] - int(passing.nonzero()[-1])) <= 2


def test_samples_follow_the_distribution(kernels: Kernels) -> None:
    probabilities = [0.5, 0.25, 0.15, 0.1]
    draws = 4000
    logits = torch.tensor([probabilities]).log().repeat(draws, 1)
    tokens = sample(kernels, logits, [draw(seed=7, position=i + 1) for i in range(draws)])
    for token, probability in enumerate(probabilities):
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(tokens.count(token) / draws - probability) < 4 * error


def test_a_draw_depends_on_seed_and_position_alone(kernels: Kernels) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    alone = sample(kernels, logits.clone(), [draw(seed=11, position=5)])
    others = [draw(seed=i, position=i + 1, top_p=0.7, temperature=2.0) for i in range(7)]
    batch = sample(kernels, torch.cat([torch.randn(7, 300), logits.clone()]), [*others, draw(seed=11, position=5)])
    assert batch[-1:] == alone
    assert uniform(11, 5) != uniform(11, 6)
    assert uniform(11, 5) != uniform(12, 5)


def test_a_draw_of_zero_takes_no_excluded_token(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least uniform number, with likelier tokens behind excluded ones."""
    monkeypatch.setattr("localmoe.engine.sampler.uniform", lambda seed, position: 0.0)
    assert sample(kernels, torch.tensor([[-9.0, -9.0, 2.0, 1.0]]), [draw(top_k=2)]) == [2]


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


def test_each_draft_is_followed_by_a_draw_that_takes_it_for_right() -> None:
    sampling = SamplingParams(max_tokens=9)
    step = SequenceStep(
        sequence_id=0,
        token_ids=(3, 4, 5),
        num_drafts=2,
        start=2,
        block_table=(0,),
        samples=True,
        sampling=sampling,
        seed=6,
        history=([1, 2], [3]),
        scores_prompt=False,
    )
    assert step.draft_ids == (4, 5)
    assert draws_of(step) == [
        Draw(sampling=sampling, seed=6, position=3, history=([1, 2], [3])),
        Draw(sampling=sampling, seed=6, position=4, history=([1, 2], [3, 4])),
        Draw(sampling=sampling, seed=6, position=5, history=([1, 2], [3, 4, 5])),
    ]


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
    draws = [draw(seed=seed, **params)]
    allowed = filtered_probabilities(logits, settings(draws))[0]
    for kernels in (ReferenceKernels(1), kernels_under_test()):
        [token] = sample(kernels, logits.clone(), draws)
        assert token is not None
        assert allowed[token] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_there_is_no_token_where_logits_are_not_finite(kernels: Kernels, bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 40)
    logits[0, 37] = bad
    assert sample(kernels, logits, [draw(temperature=temperature)] * 2)[0] is None
    assert sample(kernels, logits, [draw(temperature=temperature)] * 2)[1] is not None
