"""The kinds of engines: how each is made, and what memory it needs.

A kind that is not here comes from an installed package, by the entry point group `localmoe.engines`: a function that
takes an `EngineContext` and settings, and gives back a `Backend`. See docs/adding-an-engine.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from localmoe.backends.base import Backend, EngineContext
from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.remote_config import RemoteConfig
from localmoe.backends.vllm_config import LoraModule, VllmConfig
from localmoe.catalog.catalog import Catalog
from localmoe.config.settings import Settings, with_overrides
from localmoe.core.errors import ConfigError, LocalMoEError
from localmoe.core.events import EventBus
from localmoe.core.model import WeightFormat
from localmoe.core.protocols import Inspectable
from localmoe.core.serving import ENTRY_POINTS
from localmoe.engine.config import EngineConfig
from localmoe.hardware.gpus import find_gpus
from localmoe.text.text_model import TextModel

_PROCESS_BYTES = 1_500_000_000
"""What torch and a library around it take beside weights."""
_CPU_CACHE_BYTES = 2 << 30
"""What others than ours take for keys and values where nothing is said, or about that."""


@dataclass(frozen=True, kw_only=True)
class MadeEngine:
    """One engine that is not started yet."""

    backend: Backend
    devices: tuple[int, ...] = ()
    """GPUs that it runs on."""
    is_elsewhere: bool = False
    """Whether it is on another machine, or may be."""
    memory_bytes: int = 0
    """RAM that it needs."""
    mapped_bytes: int = 0
    """Of it, files that the system counts as available."""
    context_tokens: int | None = None
    """Its own bound on prompt and answer together, if it has one."""
    takes_adapters: bool = False
    """Whether it has the model's."""
    inspectable: Inspectable | None = None
    """The same engine, where it can be looked into."""


@dataclass(frozen=True, kw_only=True)
class EngineOrder:
    """What is to be made."""

    model: str
    """The name it is served under."""
    name: str
    """The engine's, unique among those of the model."""
    source: str
    """The model's name in the catalog."""
    weights: WeightFormat
    settings: Mapping[str, Any]
    num_natives: int
    """Native engines that the model is to have: they share the machine."""
    text: TextModel | None
    adapters: Mapping[str, LoraModule | None] = field(default_factory=dict)
    """See `ModelSpec.adapters`."""


class EngineKinds:
    """Makes engines as the settings say.

    Args:
        settings: of the server.
        catalog: where models are.
        num_threads: that native engines may use together.
        available_memory: RAM that could be taken now, in bytes.
        bus: for what happens to engines.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        *,
        num_threads: int,
        available_memory: Callable[[], int],
        bus: EventBus,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._num_threads = num_threads
        self._available_memory = available_memory
        self._bus = bus
        self._makers: Mapping[str, Callable[[EngineOrder], MadeEngine]] = {
            "native": self._native,
            "vllm": self._vllm,
            "deepspeed": self._deepspeed,
            "remote": self._remote,
        }

    def use(self, settings: Settings) -> None:
        """Make what comes from now on of other settings."""
        self._settings = settings

    def make(self, kind: str, order: EngineOrder) -> MadeEngine:
        """One engine.

        Raises:
            ConfigError: there is no such kind, or its settings are wrong.
            EngineStartError: it is not installed.
        """
        maker = self._makers.get(kind)
        return maker(order) if maker else self._from_package(kind, order)

    def _native(self, order: EngineOrder) -> MadeEngine:
        from localmoe.backends.native import NativeBackend

        config = with_overrides(EngineConfig, self._settings.engine, order.settings, "engine")
        if config.num_threads is None:
            config = replace(config, num_threads=max(1, self._num_threads // order.num_natives))
        store_path = self._catalog.store_path(order.source, order.weights)
        backend = NativeBackend(
            model=order.model,
            name=order.name,
            store_path=store_path,
            tokenizer_path=self._catalog.path(order.source),
            config=config,
            available_memory=lambda: self._available_memory() // order.num_natives,
            bus=self._bus,
        )
        store_bytes = store_path.stat().st_size
        beside_bytes = (config.kv_cache_bytes or 0) + config.tiers.reserve_bytes
        if config.tiers.ram_bytes is not None and config.tiers.ram_bytes < store_bytes + beside_bytes:
            store_bytes, beside_bytes = 0, config.tiers.ram_bytes
        return MadeEngine(
            backend=backend,
            context_tokens=config.max_context_tokens,
            devices=_native_devices(config.device),
            memory_bytes=store_bytes + beside_bytes,
            mapped_bytes=store_bytes,
            inspectable=backend,
        )

    def _vllm(self, order: EngineOrder) -> MadeEngine:
        from localmoe.backends.environments import EngineEnvironments
        from localmoe.backends.vllm import ServedModel, VllmBackend
        from localmoe.text.grammar_source import written

        config = with_overrides(VllmConfig, self._settings.vllm, order.settings, "vllm")
        text, path = self._text_of(order), self._catalog.path(order.source)
        environments, python, on_gpu, memory_bytes = EngineEnvironments(self._settings.home), None, False, 0
        if config.url is None:
            path, weights_bytes = self._checkpoint(order, "vllm")
            python = environments.python("vllm")
            installed = environments.installed("vllm")
            on_gpu = installed is not None and installed.build == "cuda"
            memory_bytes = _PROCESS_BYTES
            if not on_gpu:
                memory_bytes += weights_bytes * (2 if config.dtype == "float32" else 1)
                memory_bytes += config.kv_cache_bytes or _CPU_CACHE_BYTES
        backend = VllmBackend(
            model=ServedModel(
                name=order.model, vocab_size=text.vocab_size, probes=_probes(text), adapters=order.adapters
            ),
            name=order.name,
            model_path=path,
            config=config,
            python=python,
            on_gpu=on_gpu,
            write_grammar=written,
            bus=self._bus,
        )
        return MadeEngine(
            backend=backend,
            takes_adapters=True,
            context_tokens=config.max_model_len,
            devices=config.gpu_devices or (tuple(range(len(find_gpus()))) if on_gpu else ()),
            is_elsewhere=config.url is not None,
            memory_bytes=memory_bytes,
        )

    def _deepspeed(self, order: EngineOrder) -> MadeEngine:
        from localmoe.backends.deepspeed import DeepSpeedBackend
        from localmoe.backends.environments import EngineEnvironments

        config = with_overrides(DeepSpeedConfig, self._settings.deepspeed, order.settings, "deepspeed")
        path, weights_bytes = self._checkpoint(order, "deepspeed")
        environments = EngineEnvironments(self._settings.home)
        python = environments.python("deepspeed")
        environments.link_package("deepspeed")
        backend = DeepSpeedBackend(
            model=order.model, name=order.name, model_path=path, config=config, python=python, bus=self._bus
        )
        # ZeRO-3 splits weights over the ranks; init_inference leaves most of them with each.
        copies = config.num_ranks if config.mode == "init_inference" else config.offload_param != "nvme"
        weights_bytes *= copies * (2 if config.dtype == "float32" else 1)
        rank_bytes = _PROCESS_BYTES + (config.kv_cache_bytes or _CPU_CACHE_BYTES)
        return MadeEngine(
            backend=backend,
            context_tokens=config.max_context_tokens,
            devices=config.gpu_devices,
            memory_bytes=config.num_ranks * rank_bytes + weights_bytes,
        )

    def _remote(self, order: EngineOrder) -> MadeEngine:
        from localmoe.backends.remote import RemoteBackend

        config = with_overrides(RemoteConfig, None, {"model": order.source, **order.settings}, "remote")
        backend = RemoteBackend(name=order.name, config=config)
        return MadeEngine(backend=backend, is_elsewhere=True, takes_adapters=True)

    def _from_package(self, kind: str, order: EngineOrder) -> MadeEngine:
        known = entry_points(group=ENTRY_POINTS)
        if kind not in known.names:
            kinds = ", ".join([*self._makers, *sorted(known.names)])
            raise ConfigError(f"{kind!r} is no kind of engine; there are {kinds}")
        has_model = self._catalog.has(order.source)
        context = EngineContext(
            model=order.model,
            name=order.name,
            model_path=self._catalog.path(order.source) if has_model else None,
            home=self._settings.home,
            bus=self._bus,
        )
        settings = {**self._settings.other_engines.get(kind, {}), **order.settings}
        try:
            return MadeEngine(backend=known[kind].load()(context, settings))
        except LocalMoEError:
            raise
        except Exception as error:  # whatever it is: the package is somebody else's
            raise ConfigError(f"the engine {kind} cannot be made of its settings: {error}") from error

    def _checkpoint(self, order: EngineOrder, kind: str) -> tuple[Path, int]:
        """The directory of a model's own weights, and their size."""
        path = self._catalog.checkpoint_path(order.source)
        if path is None:
            raise ConfigError(
                f"{kind} reads checkpoints, and that of {order.source} is not there any more; take it in again with: "
                f"localmoe models convert DIRECTORY --name {order.source}"
            )
        return path, sum(file.stat().st_size for file in path.glob("*.safetensors"))

    def _text_of(self, order: EngineOrder) -> TextModel:
        if order.text is None:
            raise ConfigError(f"{order.source} has no tokenizer here; take the model in first, or make it remote")
        return order.text


def _native_devices(device: str) -> tuple[int, ...]:
    """The GPU that `engine.device` stands for, by its number."""
    if device == "cpu" or not find_gpus():
        return ()
    return (int(device.removeprefix("cuda:")) if ":" in device else 0,)


_PROBE_TEXTS = ("Hello, world!", "def f(x):\n    return x  # 1234567890", "Żółć, 漢字 и 🙂\t\n")
"""On which tokenizers of different models differ."""


def _probes(text: TextModel) -> list[tuple[str, list[int]]]:
    return [(probe, text.tokenizer.encode(probe, add_special_tokens=False)) for probe in _PROBE_TEXTS]
