"""From a model and the settings it would be served with to what is to be expected of it on this machine."""

from collections.abc import Callable
from pathlib import Path

from localmoe.bench.engine import Workload
from localmoe.bench.shapes import BenchModel
from localmoe.bench.speeds import measure_speeds
from localmoe.core.model import WeightFormat
from localmoe.engine.budget import plan_memory, settle_config
from localmoe.engine.config import EngineConfig
from localmoe.engine.estimate import Estimate, PlannedStore, estimate
from localmoe.hardware.memory import available_memory_bytes
from localmoe.kernels.base import Kernels


def predict(
    model: BenchModel,
    weights: WeightFormat,
    kernels: Kernels,
    config: EngineConfig,
    num_streams: int,
    home: Path,
    say: Callable[[str], None],
) -> Estimate:
    """Divide the memory as the engine would, measure the machine, and predict.

    Args:
        config: as for serving, with `num_threads`; prompts are predicted for its `max_num_batched_tokens`.
        num_streams: sequences that are decoded at once.
        home: LocalMoE's directory; something is written there for the time being.

    Raises:
        EngineStartError: the model does not fit, whatever is left on disk; or the machine cannot be measured.
        ModelBuildError: measuring lacks disk space.
        StoreError: no store can have this shape in this format, or the disk cannot be read.
    """
    store, tiers = PlannedStore.of(model.shape, weights), config.tiers
    available_bytes = available_memory_bytes()
    config = settle_config(store, kernels, config, available_bytes)
    plan = plan_memory(store, kernels, config, available_bytes)
    assert config.max_context_tokens is not None
    prompt_tokens = min(config.max_num_batched_tokens, config.max_context_tokens)
    workload = Workload(streams=(num_streams,), prompt_tokens=prompt_tokens)
    speeds = measure_speeds(model.shape, weights, kernels, config, workload, home, say)
    return estimate(
        model.name,
        store,
        plan,
        speeds,
        prefetch_layers=tiers.prefetch_layers,
        reserve_bytes=tiers.reserve_bytes,
    )
