"""The cache of answers, wired to the models whose answers it keeps."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

import localmoe
from localmoe.catalog.catalog import Catalog
from localmoe.config.settings import Settings
from localmoe.core.protocols import Generator
from localmoe.core.serving import ModelSpec
from localmoe.gateway.cache.answers import CachingGenerator
from localmoe.gateway.cache.build import make_cache
from localmoe.gateway.cache.config import CacheConfig
from localmoe.gateway.exchange import current_principal
from localmoe.text.text_model import TextModel

_encoder = msgspec.json.Encoder(order="deterministic", enc_hook=str)
_STORE_HEAD_BYTES = 32
"""With the checksum of a store's header, which has those of all that is in it."""


class AnswerCache(Protocol):
    """Keeps answers, or does not."""

    async def start(self) -> None:
        """Begin."""
        ...

    async def stop(self) -> None:
        """Let go of what it holds."""
        ...

    def over(self, generator: Generator, text: TextModel | None, *, version: str) -> Generator:
        """A model with the cache before it.

        Args:
            version: see `model_version`.
        """
        ...


class NoAnswerCache:
    """Keeps none."""

    async def start(self) -> None:
        """See `AnswerCache`."""

    async def stop(self) -> None:
        """See `AnswerCache`."""

    def over(self, generator: Generator, text: TextModel | None, *, version: str) -> Generator:
        """See `AnswerCache`."""
        return generator


class LeveledAnswerCache:
    """Keeps them in memory, in Redis and on disk, as its settings say.

    Args:
        home: directory of what is on disk.
    """

    def __init__(self, config: CacheConfig, *, home: Path) -> None:
        self._scope = scope_of(config)
        self._cache = make_cache(config, directory=home / "answers")

    async def start(self) -> None:
        """See `AnswerCache`."""
        await self._cache.start()

    async def stop(self) -> None:
        """See `AnswerCache`."""
        await self._cache.stop()

    def over(self, generator: Generator, text: TextModel | None, *, version: str) -> Generator:
        """See `AnswerCache`."""
        return CachingGenerator(
            generator,
            self._cache,
            model_version=version,
            scope=self._scope,
            decode=None if text is None else text.tokenizer.decode,
        )


def scope_of(config: CacheConfig) -> Callable[[], str]:
    """Of what may be used again for whoever asks now."""
    return lambda: "" if config.shared else current_principal().id


def make_answer_cache(config: CacheConfig, *, home: Path) -> AnswerCache:
    """The one that the settings ask for."""
    return LeveledAnswerCache(config, home=home) if config.enabled else NoAnswerCache()


def model_version(spec: ModelSpec, settings: Settings, catalog: Catalog) -> str:
    """Another one wherever the same request might be answered otherwise.

    Args:
        settings: of the server, by which the model's engines are made.
        catalog: where its files are.
    """
    blocks = {"native": settings.engine, "vllm": settings.vllm, "deepspeed": settings.deepspeed}
    kinds = sorted({engine.engine for engine in spec.engines})
    of_kinds = [(kind, blocks.get(kind, settings.other_engines.get(kind))) for kind in kinds]
    told = (localmoe.__version__, spec, of_kinds, list(_weights(spec, catalog)))
    return hashlib.sha256(_encoder.encode(told)).hexdigest()  # there may be secrets in it


def _weights(spec: ModelSpec, catalog: Catalog) -> Iterator[tuple[str, ...]]:
    """What tells weights from others of the same names: of stores a checksum, so that gateways with the same store
    share answers; of other files their sizes and times. None of what is not here."""
    directories = [Path(path).expanduser() for path in spec.adapters.values() if path is not None]
    if catalog.has(spec.model):
        with suppress(OSError), open(catalog.store_path(spec.model, spec.weights), "rb") as store:
            yield ("store", store.read(_STORE_HEAD_BYTES).hex())
        checkpoint = catalog.checkpoint_path(spec.model)
        if checkpoint is not None and any(engine.engine != "native" for engine in spec.engines):
            directories.append(checkpoint)
    for directory in directories:
        for path in sorted(directory.glob("*")):
            with suppress(OSError):
                status = path.stat()
                yield path.name, str(status.st_size), str(status.st_mtime_ns)
