"""From a store on disk to an engine that can step."""

import logging
from pathlib import Path

import torch

from localmoe.core.request import Request, SamplingParams
from localmoe.engine.block_pool import BlockPool
from localmoe.engine.config import EngineConfig, kv_bytes_per_token, weights_bytes
from localmoe.engine.engine import Engine
from localmoe.engine.executor import Executor
from localmoe.engine.experts import ResidentExperts
from localmoe.engine.kv_cache import KVCache
from localmoe.engine.scheduler import Scheduler
from localmoe.formats.store import Store
from localmoe.models import architecture
from localmoe.models.decoder import Decoder

logger = logging.getLogger(__name__)


def load_engine(model: str, store_path: Path, config: EngineConfig, available_memory_bytes: int) -> Engine:
    """Read a store's weights, expand them to float32, and set the engine up.

    Args:
        model: the name it is served under.
        config: settled here against the model's shape.
        available_memory_bytes: before anything is loaded.

    Raises:
        StoreError: the store is damaged.
        EngineStartError: the configuration or the memory does not fit the model.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with Store.open(store_path) as store:
        shape = store.shape
        config = config.resolve(shape, available_memory_bytes - weights_bytes(shape))
        decoder = load_decoder(store)
    assert config.kv_cache_bytes is not None
    num_blocks = config.kv_cache_bytes // (config.block_tokens * kv_bytes_per_token(shape))
    cache = KVCache(shape, num_blocks, config.block_tokens)
    pool = BlockPool(num_blocks)
    logger.info("%s: %d cache blocks of %d tokens", store_path, num_blocks, config.block_tokens)
    return Engine(model, Scheduler(config, pool), Executor(decoder, cache), pool)


def load_decoder(store: Store) -> Decoder:
    """The model of a store with all its weights in memory, in float32. Raises StoreError."""
    dense = {name: store.read_dense(name).float() for name in store.dense_names}
    return architecture({"model_type": store.shape.model_type})(store.shape, dense, ResidentExperts(store))


def warm_up(engine: Engine) -> None:
    """Run one short request, so that the first client does not pay for lazy initialisation."""
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    engine.scheduler.add(Request(id="warm-up", model="", prompt_ids=[0, 0], sampling=sampling))
    while engine.scheduler.has_work:
        engine.step()
