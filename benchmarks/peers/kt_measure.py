"""Speed of kt-kernel's MoE layers alone; runs in kt-kernel's environment, prints JSON.

Layers of random weights take turns, so that no cache holds them. The figure is tokens a second through `--layers` of
them, with experts chosen evenly and no attention.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from kt_kernel import kt_kernel_ext  # type: ignore[import-not-found]

GROUP = 32
"""Elements that share a scale."""
MIN_TIME_S = 3.0


def fp4_layer(config: Any, experts: int, rows: int, hidden: int) -> tuple[Any, list[torch.Tensor]]:
    """MXFP4 with random nibbles; (layer, tensors to keep)."""
    keep = []
    sizes = {"gate": (rows, hidden), "up": (rows, hidden), "down": (hidden, rows)}
    for name, (num_rows, num_cols) in sizes.items():
        nibbles = torch.randint(0, 256, (experts, num_rows, num_cols // 2), dtype=torch.uint8)
        scales = torch.full((experts, num_rows, num_cols // GROUP), 2.0**-8, dtype=torch.bfloat16)
        setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in nibbles]])
        setattr(config, f"{name}_scales", [[expert.data_ptr() for expert in scales]])
        keep += [nibbles, scales]
    config.quant_config.bits = 4
    config.quant_config.group_size = GROUP
    config.quant_config.zero_point = False
    return kt_kernel_ext.moe.AMXFP4_KGroup_MOE(config), keep


def int4_layer(config: Any, experts: int, rows: int, hidden: int) -> tuple[Any, list[torch.Tensor]]:
    """INT4 with a scale a row, quantised by kt-kernel from random BF16; (layer, tensors to keep while loading)."""
    keep = []
    sizes = {"gate": (rows, hidden), "up": (rows, hidden), "down": (hidden, rows)}
    for name, (num_rows, num_cols) in sizes.items():
        weights = torch.empty(experts, num_rows, num_cols, dtype=torch.bfloat16).normal_(std=0.02)
        setattr(config, f"{name}_proj", weights.data_ptr())
        keep.append(weights)
    return kt_kernel_ext.moe.AMXInt4_MOE(config), keep


def time_per_call_s(call: Callable[[int], None], num_layers: int) -> float:
    """Median time of a call, as `localmoe bench kernels` takes it: each layer in turn, once around to warm up, for at
    least `MIN_TIME_S`."""
    for index in range(num_layers):
        call(index)
    times_s: list[float] = []
    while sum(times_s) < MIN_TIME_S:
        for index in range(num_layers):
            started_s = time.perf_counter()
            call(index)
            times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s)


def load_layers(cpu: Any, args: argparse.Namespace) -> list[Any]:
    """As many layers as take turns."""
    order = torch.arange(args.experts, dtype=torch.int64)
    make = fp4_layer if args.kernel == "fp4" else int4_layer
    layers = []
    for index in range(args.rotated_layers):
        config = kt_kernel_ext.moe.MOEConfig(args.experts, args.top_k, args.hidden, args.rows, 0)
        config.layer_idx = index
        config.max_len = max(args.tokens)
        config.pool = cpu.backend_
        layer, tensors = make(config, args.experts, args.rows, args.hidden)
        cpu.submit(layer.load_weights_task(order.data_ptr()))
        cpu.sync()
        layers.append(layer)
        del tensors
    return layers


def layer_s(cpu: Any, layers: list[Any], tokens: int, args: argparse.Namespace) -> float:
    """Median time of a layer on so many tokens."""
    count = torch.tensor([tokens], dtype=torch.int32)
    # Other experts for every layer, as there would be.
    chosen = [torch.rand(tokens, args.experts).argsort(-1)[:, : args.top_k].contiguous() for _ in layers]
    weights = torch.full((tokens, args.top_k), 1 / args.top_k)
    x = torch.randn(tokens, args.hidden).to(torch.bfloat16)
    y = torch.empty_like(x)

    def call(index: int) -> None:
        pointers = (t.data_ptr() for t in (chosen[index], weights, x, y))
        cpu.submit(layers[index].forward_task(count.data_ptr(), args.top_k, *pointers, False))
        cpu.sync()

    median_s = time_per_call_s(call, len(layers))
    assert 0 < float(y.abs().sum()) < float("inf"), "the kernel computed nothing"
    return median_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernel", choices=("fp4", "int4"))
    for name in ("threads", "experts", "top-k", "hidden", "rows", "layers", "rotated-layers"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    pool = kt_kernel_ext.WorkerPoolConfig()
    pool.subpool_count = 1
    pool.subpool_numa_map = [0]
    pool.subpool_thread_count = [args.threads]
    cpu = kt_kernel_ext.CPUInfer(pool)
    layers = load_layers(cpu, args)
    result = {tokens: tokens / (layer_s(cpu, layers, tokens, args) * args.layers) for tokens in args.tokens}
    print(json.dumps({"variant": kt_kernel_ext.__cpu_variant__, "tok_s": result}))


if __name__ == "__main__":
    main()
