"""The Triton kernels under test: compiled for a CUDA device where there is one, else interpreted on CPU tensors."""

from functools import cache

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from localmoe.kernels.gpu import GpuKernels
from localmoe.kernels.triton.product import INTERPRETED

_CUDA = torch.cuda.is_available()

on_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(_CUDA, reason="the kernels are compiled for the GPU")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not _CUDA, reason="no CUDA device")]),
    ],
)
"""Both ways to run the kernels, of which a machine has one: Triton decides when it is imported."""

not_finite = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""NumPy, which interprets the kernels, warns of numbers that are not finite."""


@cache
def gpu_kernels(device: str) -> GpuKernels:
    assert INTERPRETED.value == (device == "cpu"), "tests/conftest.py chooses before anything imports Triton"
    return GpuKernels(torch.device(device))
