"""Which models a parity test runs on, and how to run an engine inside a test."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from localmoe.catalog.catalog import DEMO_NAME
from localmoe.config.settings import load_settings
from localmoe.core.plans import SequenceStep
from localmoe.core.protocols import Routed
from localmoe.core.request import Request, RequestFailed, SamplingParams, TokenChunk
from localmoe.engine.budget import MemoryPlan
from localmoe.engine.config import EngineConfig, kv_bytes_per_token
from localmoe.engine.engine import Engine
from localmoe.engine.insight import Insight
from localmoe.engine.kv_cache import KVCache, place
from localmoe.engine.observed_experts import ObservedExperts
from localmoe.engine.relief import nothing_to_give
from localmoe.kernels.base import Kernels
from localmoe.kernels.select import select_kernels
from localmoe.models.decoder import Decoder

# The demo's experts all compute one function, so it alone could not catch a wrong expert.
all_models = pytest.mark.parametrize(
    "model_under_test",
    ["distinct-experts", "dense", "olmoe", "qwen3_moe", pytest.param(DEMO_NAME, marks=pytest.mark.slow)],
    indirect=True,
)


@cache
def kernels_under_test() -> Kernels:
    """What the environment asks for, as `LOCALMOE_ENGINE__CPU_LEVEL=avx2`; the best of this machine if nothing."""
    return select_kernels(load_settings().engine.cpu_level, 2, pin=False)


class FakeExperts:
    """Experts that do what a function does to (routed, x)."""

    def __init__(self, compute: Callable[[Routed[Tensor], Tensor], object]) -> None:
        self._compute = compute

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        pass

    def state(self) -> None:
        return None

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        self._compute(routed, x_TD)


def outcome(engine: Engine) -> list[int] | str:
    """The tokens of a request, always the same one, or why it failed."""
    engine.add(greedy("a", [5, 17, 3, 99, 42, 8, 61, 23, 2, 77, 31, 12], 6))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, RequestFailed):
                return output.message
            tokens += output.token_ids
    return tokens


def routed_to(layer: int, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Routed[Tensor]:
    """Tokens of a layer after which there is none."""
    return Routed(layer=layer, h_TD=h_TD, ids_TK=ids_TK, weights_TK=weights_TK, ahead=())


def make_engine(
    decoder: Decoder, config: EngineConfig, num_blocks: int = 400, kernels: Kernels | None = None
) -> Engine:
    """An engine around a loaded decoder, with a float32 cache of this many blocks.

    Args:
        kernels: the decoder's; None: those under test.
    """
    block_bytes = config.block_tokens * kv_bytes_per_token(decoder.shape, "f32")
    config = replace(config, kv_cache_bytes=num_blocks * block_bytes, kv_cache_dtype="f32")
    return Engine(
        "test", decoder, kernels or kernels_under_test(), config, blind_insight(decoder), nothing_to_give
    )


def blind_insight(decoder: Decoder) -> Insight:
    """Insight of an engine that nobody looks into: its decoder's experts are not watched."""
    shape = decoder.shape
    plan = MemoryPlan(
        budget_bytes=0, kv_cache_bytes=0, workspace_bytes=0, dense_bytes=0, num_slots=None, slot_bytes=1
    )
    present = np.ones((shape.num_layers, shape.num_experts), np.bool_)
    experts = ObservedExperts(decoder.experts, shape, stall_s=lambda: 0.0, present=lambda: present)
    return Insight(shape, plan, 1, experts)


def greedy(name: str, prompt_ids: list[int], max_tokens: int = 64) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(id=name, model="test", prompt_ids=prompt_ids, sampling=sampling)


def to_embed(name: str, prompt_ids: list[int]) -> Request:
    """Asks for a prompt's embedding."""
    sampling = SamplingParams(max_tokens=0, temperature=0.0)
    return Request(id=name, model="test", prompt_ids=prompt_ids, sampling=sampling, embed=True)


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Submit all at once and step until everything is finished."""
    tokens: dict[str, list[int]] = {}
    for request in requests:
        tokens[request.id] = []
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, TokenChunk), output
            tokens[output.request_id] += output.token_ids
    return tokens


def paged_logits(
    decoder: Decoder, token_ids: list[int], chunk_tokens: int, cache_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits at every position, computed in chunks through the paged cache with scattered blocks."""
    block_tokens = 16
    num_blocks = -(-len(token_ids) // block_tokens)
    cache = KVCache(decoder.shape, num_blocks, block_tokens, cache_dtype, decoder.device)
    table = tuple(torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist())
    logits = []
    for start in range(0, len(token_ids), chunk_tokens):
        chunk = token_ids[start : start + chunk_tokens]
        step = SequenceStep(
            sequence_id=0,
            token_ids=tuple(chunk),
            start=start,
            block_table=table,
            samples=False,
            sampling=SamplingParams(max_tokens=1),
            seed=0,
            history=(token_ids, []),
            scores_prompt=False,
        )
        placed = place([step], block_tokens, decoder.frequencies)
        decoder.experts.begin_step([len(chunk) > 1] * len(chunk))
        x_TD = decoder.forward(torch.tensor(chunk, dtype=torch.int32), cache, placed)
        logits.append(decoder.logits(x_TD))
    return torch.cat(logits)
