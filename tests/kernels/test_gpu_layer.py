"""The Triton kernels together: a whole model, and a layer captured in a CUDA graph."""

from pathlib import Path

import pytest
import torch
from gpu_device import gpu_kernels, on_device
from kernel_samples import HIDDEN, Batch, attention_weights, expert_weights, random, router_weights
from torch import Tensor

from localmoe.catalog.catalog import Catalog
from localmoe.core.model import WeightFormat
from localmoe.engine.load import load_decoder
from localmoe.formats.store import Store
from localmoe.kernels.base import placed_experts
from localmoe.kernels.reference import ReferenceKernels
from support.models import paged_logits

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the helper keeps its cache in RAM")
@torch.inference_mode()
def test_a_model(tiny_home: Path) -> None:
    """At once and in chunks."""
    with Store.open(Catalog(tiny_home).store_path("olmoe", WeightFormat.F32)) as store:
        expected = paged_logits(load_decoder(store, ReferenceKernels(2)), TOKENS, len(TOKENS))
        decoder = load_decoder(store, gpu_kernels("cpu"))
        at_once, in_chunks = (paged_logits(decoder, TOKENS, count) for count in (len(TOKENS), 5))
    torch.testing.assert_close(at_once, expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(at_once, in_chunks)


@on_device
@torch.inference_mode()
def test_a_layer_waits_for_nothing_and_can_be_captured(device: str) -> None:
    """A step of two sequences, one of them with a long context, at once and replayed from a graph."""
    kernels = gpu_kernels(device)
    weights = attention_weights(WeightFormat.INT8, 4, 2, 16)
    batch = Batch([(600, 1), (37, 1)], weights, dtype=torch.bfloat16)
    attend = kernels.attention(weights)
    route = kernels.router(router_weights(random(6, HIDDEN, seed=3), 3, normalize=True, weights=WeightFormat.BF16))
    experts = placed_experts(kernels, expert_weights(WeightFormat.MXFP4, 6, HIDDEN, 32))
    keys, values = (cache.to(device) for cache in batch.cache)
    x = batch.x_TD.clone().to(device)

    def layer() -> Tensor:
        attend(x, keys, values, batch.step)
        experts(*route(x), x)
        return x

    eager = layer().clone()
    x.copy_(batch.x_TD)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer()
        x.copy_(batch.x_TD)
        graph.replay()
    else:
        layer()
    assert torch.equal(x.cpu(), eager.cpu())
    assert x.isfinite().all()
