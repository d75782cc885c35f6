"""From a store on disk to an engine that can step."""

from pathlib import Path

import torch

from localmoe.core.errors import EngineStartError
from localmoe.core.request import Request, RequestFailed, SamplingParams
from localmoe.engine.config import EngineConfig, weights_bytes
from localmoe.engine.engine import Engine
from localmoe.engine.experts import ResidentExperts
from localmoe.formats.store import Store
from localmoe.models import architecture
from localmoe.models.decoder import Decoder


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
    return Engine(model, decoder, config)


def load_decoder(store: Store) -> Decoder:
    """The model of a store with all its weights in memory, in float32. Raises StoreError."""
    dense = {name: store.read_dense(name).float() for name in store.dense_names}
    return architecture({"model_type": store.shape.model_type})(store.shape, dense, ResidentExperts(store))


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
