"""The worker's draws are the native engine's, which has a sampler of its own."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localmoe.backends.deepspeed_worker.sampling import draw, score
from localmoe.core.request import SamplingParams
from localmoe.engine import sampler
from localmoe.kernels.reference import ReferenceKernels

VOCAB = 50


def both(logits_V: torch.Tensor, sampling: SamplingParams, **where: Any) -> tuple[int | None, int | None]:
    native = sampler.Draw(
        sampling=sampling,
        seed=where["seed"],
        position=where["position"],
        history=(where["prompt_ids"], where["output_ids"]),
    )
    [expected] = sampler.sample(ReferenceKernels(1), logits_V[None].clone(), [native])
    return draw(logits_V.clone(), sampling, **where), expected


@given(
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 1e-6, 0.3, 1.0, 4.0]),
            "top_k": st.sampled_from([0, 1, 7, 60]),
            "top_p": st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
            "min_p": st.sampled_from([0.0, 0.1, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.7]),
            "presence_penalty": st.sampled_from([0.0, 1.5]),
            "frequency_penalty": st.sampled_from([0.0, -0.5]),
            "logit_bias": st.sampled_from([{}, {3: -100.0, 4: 2.5}]),
        }
    ),
    st.integers(0, 2**62),
    st.integers(1, 10_000),
)
def test_tokens_are_those_of_the_native_engine(params: dict[str, Any], seed: int, position: int) -> None:
    chance = torch.Generator().manual_seed(position)
    logits_V = 3 * torch.randn(VOCAB, generator=chance)
    ids = torch.randint(VOCAB, (20,), generator=chance).tolist()
    sampling = SamplingParams(max_tokens=1, **params)
    drawn, expected = both(
        logits_V, sampling, seed=seed, position=position, prompt_ids=ids[:8], output_ids=ids[8:]
    )
    assert drawn == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_there_is_no_token_where_logits_are_not_finite(bad: float, temperature: float) -> None:
    logits_V = torch.zeros(VOCAB)
    logits_V[7] = bad
    sampling = SamplingParams(max_tokens=1, temperature=temperature)
    assert draw(logits_V, sampling, seed=0, position=1, prompt_ids=[], output_ids=[]) is None


def test_scores_are_those_of_the_native_engine() -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    assert score(logits_V, 5, 3) == sampler.score(logits_V, 5, 3)
