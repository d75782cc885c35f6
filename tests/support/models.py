"""Which models a parity test runs on, and how to run an engine inside a test."""

from collections.abc import Iterable

import pytest

from localmoe.catalog.catalog import DEMO_NAME
from localmoe.core.request import Request, SamplingParams, TokenChunk
from localmoe.engine.block_pool import BlockPool
from localmoe.engine.config import EngineConfig
from localmoe.engine.engine import Engine
from localmoe.engine.executor import Executor
from localmoe.engine.kv_cache import KVCache
from localmoe.engine.scheduler import Scheduler
from localmoe.models.decoder import Decoder

# The demo's experts all compute one function, so it alone could not catch a wrong expert.
all_models = pytest.mark.parametrize(
    "model_under_test",
    ["distinct-experts", "dense", pytest.param(DEMO_NAME, marks=pytest.mark.slow)],
    indirect=True,
)


def make_engine(decoder: Decoder, config: EngineConfig, num_blocks: int = 400) -> tuple[Engine, BlockPool]:
    """An engine around a loaded decoder, with its pool for looking into."""
    pool = BlockPool(num_blocks)
    cache = KVCache(decoder.shape, num_blocks, config.block_tokens)
    return Engine("test", Scheduler(config, pool), Executor(decoder, cache), pool), pool


def greedy(name: str, prompt_ids: list[int], max_tokens: int = 64) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(id=name, model="test", prompt_ids=prompt_ids, sampling=sampling)


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Submit all at once and step until everything is finished."""
    tokens: dict[str, list[int]] = {}
    for request in requests:
        tokens[request.id] = []
        engine.scheduler.add(request)
    while engine.scheduler.has_work:
        for output in engine.step():
            assert isinstance(output, TokenChunk), output
            tokens[output.request_id] += output.token_ids
    return tokens
