"""Draws in torch on the device against the reference's."""

import numpy as np
import pytest
import torch
from gpu_device import gpu_kernels, on_device
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import random

from localmoe.kernels.base import Draws
from localmoe.kernels.reference import ReferenceKernels


def draws(rows: list[tuple[float, int, float, float, float]]) -> Draws:
    temperatures, top_k, top_p, min_p, uniforms = zip(*rows, strict=True)
    return Draws(
        temperatures_S=np.array(temperatures, np.float32),
        top_k_S=np.array(top_k, np.int32),
        top_p_S=np.array(top_p, np.float32),
        min_p_S=np.array(min_p, np.float32),
        uniforms_S=np.array(uniforms),
    )


a_draw = st.tuples(
    st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0]),
    st.sampled_from([0, 1, 2, 7, 50, 1000]),
    st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.floats(0, 1, exclude_max=True),
)


@on_device
@settings(deadline=None, max_examples=100)
@given(st.lists(a_draw, min_size=1, max_size=6), st.booleans(), st.integers(0, 1000))
def test_draws(device: str, rows: list[tuple[float, int, float, float, float]], ties: bool, seed: int) -> None:
    logits = 2 * random(len(rows), 50, seed=seed)
    if ties:
        logits = logits.round()
    found = gpu_kernels(device).draw(logits.to(device), draws(rows))
    assert found == ReferenceKernels(2).draw(logits, draws(rows))


@on_device
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_there_is_nothing_to_draw_from_what_is_no_finite_number(
    device: str, number: float, temperature: float
) -> None:
    logits = random(3, 50)
    logits[1, 20] = number
    settings_ = draws([(temperature, 0, 1.0, 0.0, 0.5)] * 3)
    first, second, third = gpu_kernels(device).draw(logits.to(device), settings_)
    assert second == -1
    assert min(first, third) >= 0
