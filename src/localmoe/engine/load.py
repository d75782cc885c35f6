"""From a store on disk to an engine that can step."""

import logging
from pathlib import Path

import torch

from localmoe.core.errors import EngineStartError
from localmoe.core.request import Request, RequestFailed, SamplingParams
from localmoe.engine.config import EngineConfig, num_weights
from localmoe.engine.engine import Engine
from localmoe.engine.experts import ResidentExperts
from localmoe.formats.store import Store
from localmoe.kernels.base import Kernels
from localmoe.kernels.select import select_kernels
from localmoe.models import architecture
from localmoe.models.decoder import Decoder

logger = logging.getLogger(__name__)


def load_engine(model: str, store_path: Path, config: EngineConfig, available_memory_bytes: int) -> Engine:
    """Map a store, check it, and set the engine up on the kernels that the configuration says.

    Args:
        model: the name it is served under.
        config: with `num_threads`; the rest is settled here against the model's shape.
        available_memory_bytes: before anything is loaded.

    Raises:
        StoreError: the store is damaged.
        EngineStartError: the configuration or the memory does not fit the model.
    """
    num_threads = config.num_threads
    assert num_threads is not None, "settled by whoever starts the engine"
    # What torch still does is small; its threads would only be in the way of the kernels' own.
    torch.set_num_threads(1)
    kernels = select_kernels(config.cpu_level, num_threads, pin=config.pin_threads)
    with Store.open(store_path) as store:
        needed_bytes = kernels.memory_bytes(store.total_bytes, num_weights(store.shape))
        config = config.resolve(store.shape, store.weights, available_memory_bytes - needed_bytes)
        store.check(num_threads)
        decoder = load_decoder(store, kernels)
    logger.info("%s computes with %s", model, kernels.name)
    return Engine(model, decoder, kernels, config)


def load_decoder(store: Store, kernels: Kernels) -> Decoder:
    """The model of a store with all its weights in memory. Raises StoreError."""
    decoder = architecture({"model_type": store.shape.model_type})
    return decoder(store.shape, store, ResidentExperts(store, kernels), kernels)


def warm_up(engine: Engine) -> None:
    """Run one short request, so that the first client does not pay for lazy initialisation.

    Raises:
        EngineStartError: the model cannot compute even that.
    """
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    engine.add(Request(id="warm-up", model="", prompt_ids=[0, 0], sampling=sampling))
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, RequestFailed):
                raise EngineStartError(f"the model cannot compute: {output.message}")
