"""Compiles every launch of a decoder's operations for a GPU that need not be here; run by `test_gpu_compiles`.

Usage: compile_kernels.py CAPABILITY FORMAT... (as 80 mxfp4 bf16)
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_samples import paged_step, scattered_tables, weight_matrix

from localmoe.core.model import WeightFormat
from localmoe.formats.store import ExpertWeights
from localmoe.kernels.base import AttentionWeights, RouterWeights, placed_experts
from localmoe.kernels.gpu import GpuKernels

MAX_SHARED_BYTES = 99 << 10
"""Of a thread block on the smallest devices (capability 8.6 and 8.9)."""
D, F, HEAD = 256, 128, 128


class AbsentDriver:
    """Says what it would be like to have a device."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Takes the place of a launch."""

    def __init__(self) -> None:
        self._run = triton.JITFunction.run
        self.kernels: dict[str, Any] = {}

    def __call__(self, function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = self._run(function, *args, grid=grid, warmup=True, **options)
        self.kernels[kernel.hash] = kernel
        if kernel.metadata.shared > MAX_SHARED_BYTES:
            raise SystemExit(f"{kernel.name} with {options} needs {kernel.metadata.shared} bytes of shared memory")


def attention(kernels: GpuKernels, weights: WeightFormat, norm: int | None, dtype: torch.dtype) -> None:
    heads, groups, block = 4, 2, 16
    vector = None if norm is None else torch.ones(norm)
    k_vector = None if norm is None else torch.ones(norm if norm == HEAD else groups * HEAD)
    attend = kernels.attention(
        AttentionWeights(
            norm_D=torch.ones(D),
            q=weight_matrix(weights, heads * HEAD, D),
            k=weight_matrix(weights, groups * HEAD, D),
            v=weight_matrix(weights, groups * HEAD, D),
            o=weight_matrix(weights, D, heads * HEAD),
            q_norm=vector,
            k_norm=k_vector,
            num_heads=heads,
            num_kv_heads=groups,
            eps=1e-5,
        )
    )
    for spans in ([(5, 1)], [(600, 1)], [(600, 40)] * 260):
        tables, num_blocks = scattered_tables([sum(span) for span in spans[:1]], block)
        tables = np.repeat(tables, len(spans), axis=0)
        step = paged_step(spans, tables, block, HEAD)
        keys = torch.zeros(num_blocks, groups, HEAD, block, dtype=dtype)
        attend(torch.zeros(len(step.slots_T), D), keys, keys.transpose(2, 3).contiguous(), step)


def everything(kernels: GpuKernels, formats: list[WeightFormat]) -> None:
    norm = torch.ones(D)
    for weights in formats:
        matrix = weight_matrix(weights, D, D)
        kernels.embedding(matrix)(torch.zeros(3, dtype=torch.int32))
        expert = ExpertWeights(
            gate=weight_matrix(weights, F, D), up=weight_matrix(weights, F, D), down=weight_matrix(weights, D, F)
        )
        experts = placed_experts(kernels, [expert] * 8)
        kernels.head(norm, matrix, 1e-5)(torch.zeros(3, D))
        for num_tokens in (1, 100):
            x = torch.zeros(num_tokens, D)
            ids, shares = torch.zeros(num_tokens, 2, dtype=torch.int32), torch.zeros(num_tokens, 2)
            experts(x, ids, shares, x)
    for weights in (WeightFormat.BF16, WeightFormat.INT8):
        bound = RouterWeights(norm_D=norm, router=weight_matrix(weights, 8, D), top_k=2, normalize=True, eps=1e-5)
        kernels.router(bound)(torch.zeros(3, D))
    attention(kernels, WeightFormat.MXFP4, None, torch.bfloat16)
    for norm_size in (HEAD, 4 * HEAD):
        attention(kernels, WeightFormat.BF16, norm_size, torch.float32)


def main() -> None:
    driver.set_active(AbsentDriver(int(sys.argv[1])))
    compiler = Compiler()
    triton.JITFunction.run = lambda self, *args, **options: compiler(self, *args, **options)
    everything(GpuKernels(torch.device("cpu")), [WeightFormat(name) for name in sys.argv[2:]])
    for kernel in sorted(compiler.kernels.values(), key=lambda kernel: kernel.name):
        print(kernel.name, kernel.metadata.shared, len(kernel.asm["cubin"]))
    names = {kernel.name for kernel in compiler.kernels.values()}
    print(len(compiler.kernels), "compiled:", *sorted(names))


if __name__ == "__main__":
    main()
