"""Routing traces: small ones made up, and the shared ones."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from localmoe.residency.trace import LayerUse, RoutingTrace

SHARED_TRACES = ("gemma-4-26b-a4b.route.csv.gz", "gpt-oss-120b.route.csv.gz")
_SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "routing"


def shared_trace(name: str) -> Path:
    """Its path; skips the test where it is not there."""
    path = _SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/data/routing/{name} is not there")
    return path


def make_trace(
    num_layers: int, num_experts: int, uses: Iterable[tuple[int, list[list[int]], bool]]
) -> RoutingTrace:
    """A trace of uses (layer, experts of each token, whether of a prompt)."""
    return RoutingTrace(
        model="made up",
        num_layers=num_layers,
        num_experts=num_experts,
        uses=tuple(
            LayerUse(layer=layer, experts=np.array(experts, np.int16), is_prompt=is_prompt)
            for layer, experts, is_prompt in uses
        ),
    )


def random_trace(
    seed: int, *, num_layers: int = 2, num_experts: int = 4, num_used: int = 2, num_steps: int = 8
) -> RoutingTrace:
    """Steps through all layers; a prompt's in every third, of one to three tokens. The last is decoded."""
    rng = np.random.default_rng(seed)
    uses = []
    for step in range(num_steps):
        is_prompt = step % 3 == 0 and step < num_steps - 1
        num_tokens = int(rng.integers(1, 4)) if is_prompt else 1
        for layer in range(num_layers):
            tokens = [rng.permutation(num_experts)[:num_used].tolist() for _ in range(num_tokens)]
            uses.append((layer, tokens, is_prompt))
    return make_trace(num_layers, num_experts, uses)
