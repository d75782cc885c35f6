"""Which models a parity test runs on, and how to run an engine inside a test."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from localmoe.catalog.catalog import DEMO_NAME
from localmoe.core.request import Request, SamplingParams, TokenChunk
from localmoe.engine.config import EngineConfig, kv_bytes_per_token
from localmoe.engine.engine import Engine
from localmoe.models.decoder import Decoder

# The demo's experts all compute one function, so it alone could not catch a wrong expert.
all_models = pytest.mark.parametrize(
    "model_under_test",
    ["distinct-experts", "dense", pytest.param(DEMO_NAME, marks=pytest.mark.slow)],
    indirect=True,
)


def make_engine(decoder: Decoder, config: EngineConfig, num_blocks: int = 400) -> Engine:
    """An engine around a loaded decoder, with a cache of this many blocks."""
    block_bytes = config.block_tokens * kv_bytes_per_token(decoder.shape)
    return Engine("test", decoder, replace(config, kv_cache_bytes=num_blocks * block_bytes))


def greedy(name: str, prompt_ids: list[int], max_tokens: int = 64) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(id=name, model="test", prompt_ids=prompt_ids, sampling=sampling)


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
