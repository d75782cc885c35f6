"""What `doctor` and `models estimate` share: finding the model that is meant, and predicting it."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from localmoe.catalog.catalog import Catalog
from localmoe.config.settings import Settings
from localmoe.core.errors import ConfigError
from localmoe.core.model import WeightFormat
from localmoe.engine.config import EngineConfig

if TYPE_CHECKING:
    from localmoe.bench.shapes import BenchModel
    from localmoe.engine.estimate import Estimate


def find_model(spec: str, settings: Settings) -> "BenchModel":
    """A model of the catalog, a shape that benchmarks know, or that of a `config.json` or GGUF file.

    Raises:
        ConfigError: none of these.
        CheckpointError: the file cannot be read, or its architecture is not supported.
    """
    from localmoe.bench import shapes

    catalog = Catalog(settings.home)
    if catalog.has(spec):
        return shapes.BenchModel(name=spec, shape=shapes.find_model(str(catalog.path(spec) / "config.json")).shape)
    if spec in shapes.SHAPES or spec.endswith((".json", ".gguf")):
        return shapes.find_model(spec)
    known = [*(entry.name for entry in catalog.list()), *shapes.SHAPES]
    raise ConfigError(
        f"the model is {spec!r}; give {', '.join(known)}, or the path of a config.json or a GGUF file"
    )


def with_threads(config: EngineConfig, threads: int | None) -> EngineConfig:
    """As many compute threads as the command line says, else the settings, else one for each core."""
    from localmoe.hardware.processors import num_processors

    return replace(config, num_threads=threads or config.num_threads or num_processors())


def predict_model(
    model: "BenchModel",
    weights: WeightFormat,
    settings: Settings,
    config: EngineConfig,
    num_streams: int,
    say: Callable[[str], None],
) -> "Estimate":
    """See `bench.predict`."""
    from localmoe.bench.machine import require_cpu_kernels

    require_cpu_kernels()  # first: what follows cannot be measured without
    import torch

    from localmoe.bench.predict import predict
    from localmoe.kernels.select import select_kernels

    assert config.num_threads is not None
    torch.set_num_threads(1)  # as when serving
    kernels = select_kernels(config.cpu_level, config.num_threads, pin=config.pin_threads)
    return predict(model, weights, kernels, config, num_streams, settings.home, say)
