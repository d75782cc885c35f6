"""The models on this machine: `home/models/<name>/`, each with configuration, tokenizer and expert stores.

A model directory holds what a Hugging Face checkpoint holds, with or without its weights, and in `stores/` one
expert store per weight format. This module is free of torch, so that processes which only look do not load it.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from localmoe.catalog.building import Progress, build_lock, fresh_directory
from localmoe.core.errors import CheckpointError, ModelBuildError, ModelFileError, ModelNotFoundError
from localmoe.core.model import ModelShape, TensorNames, WeightFormat
from localmoe.formats.files import MAX_FILE_BYTES, read_json_object
from localmoe.formats.store_version import LAYOUT_VERSION, stored_version

if TYPE_CHECKING:
    from localmoe.formats.checkpoint import Checkpoint

DEMO_NAME = "smollm2-8x135m"
"""The model that `catalog.demo` makes, and that is served when none is named."""

_STRIPE_SUFFIX = ".stripe"
_CHECKPOINT_LINK = "checkpoint"
"""To where a converted model came from, for engines that read checkpoints."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_REQUIRED_FILES = ("config.json", "tokenizer.json")
_OPTIONAL_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model of the catalog."""

    name: str
    path: Path
    model_type: str | None
    """None if `config.json` cannot be read; `verify` says why."""
    weights: tuple[WeightFormat, ...]
    """Formats whose store exists."""
    has_checkpoint: bool
    """Whether stores of other formats can be made."""
    size_bytes: int
    """Of all files in its directory."""


@dataclass(frozen=True, kw_only=True)
class VerifiedPart:
    """A part of a model that was found whole."""

    path: Path
    num_tensors: int
    size_bytes: int


class Catalog:
    """Looks models up, makes their stores, and takes models in and out.

    Args:
        home: LocalMoE's directory; models are in its `models/`.
    """

    def __init__(self, home: Path) -> None:
        self.models_path = home / "models"

    def list(self) -> tuple[ModelEntry, ...]:
        """All models, by name."""
        return tuple(_entry(self.models_path / name) for name in self._names())

    def has(self, name: str) -> bool:
        """Whether there is a model of this name."""
        return is_name(name) and (self.models_path / name / "config.json").is_file()

    def path(self, name: str) -> Path:
        """The directory of a model.

        Raises:
            ModelNotFoundError: no such model, or not a name; says which there are.
        """
        if self.has(name):
            return self.models_path / name
        if names := self._names():
            advice = f"available: {', '.join(names)}"
        else:
            advice = "there are none yet; make the demo model with: localmoe models build-demo"
        raise ModelNotFoundError(f"model {name!r:.100} is not in {self.models_path}; {advice}")

    def context_tokens(self, name: str) -> int:
        """The longest sequence the model was made for.

        Raises:
            ModelNotFoundError: no such model.
            CheckpointError: its configuration does not say.
        """
        path = self.path(name) / "config.json"
        tokens = read_json_object(path).get("max_position_embeddings")
        if type(tokens) is not int or tokens < 1:
            raise CheckpointError(f"{path}: max_position_embeddings is {tokens!r}; it must be a positive integer")
        return tokens

    def new_path(self, name: str) -> Path:
        """Where a model of this name would be. Raises ModelBuildError if it is not a name."""
        if not is_name(name):
            raise ModelBuildError(
                f"{name!r:.100} cannot be a model's name; allowed are up to 96 letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit"
            )
        return self.models_path / name

    def store_path(self, name: str, weights: WeightFormat) -> Path:
        """Where a model's store of this format is, or would be. Raises ModelNotFoundError."""
        return self.path(name) / "stores" / f"{weights}.store"

    def has_store(self, name: str, weights: WeightFormat) -> bool:
        """Whether a store of this format is there that need not be made anew: one of an older layout must, where a
        checkpoint allows it. What is wrong with it otherwise is for its reader to say.

        Raises:
            ModelNotFoundError: no such model.
        """
        path = self.store_path(name, weights)
        if not path.exists():
            return False
        return stored_version(path) in (LAYOUT_VERSION, None) or not _has_checkpoint(self.path(name))

    def ensure_store(self, name: str, weights: WeightFormat, on_progress: Progress) -> Path:
        """The model's store of this format, made from its checkpoint if it is not there yet or of an older layout.

        Raises:
            ModelNotFoundError: no such model.
            ModelFileError: there is neither store nor checkpoint, or the checkpoint is damaged.
            ModelBuildError: the store could not be written.
        """
        path, directory = self.store_path(name, weights), self.path(name)
        if self.has_store(name, weights):
            return path
        with build_lock(directory, on_progress):
            if self.has_store(name, weights):
                return path
            if not _has_checkpoint(directory):
                raise ModelFileError(
                    f"{path}: there is no such store and no checkpoint beside it to make one from; "
                    f"remove the model (localmoe models rm {name}) and convert its source again with "
                    f"--weights {weights}"
                )
            from localmoe.formats.checkpoint import Checkpoint

            write_model_store(Checkpoint.open(directory), directory, weights, on_progress)
        return path

    def convert(self, source: Path, name: str, weights: WeightFormat, on_progress: Progress) -> Path:
        """Take a Hugging Face checkpoint into the catalog: its JSON files and a store, not its weights, to which it
        keeps a link.

        Returns:
            The new model's directory.

        Raises:
            CheckpointError: the source is damaged, incomplete or of an unsupported architecture.
            ModelBuildError: the name is taken or no name, or writing failed; nothing is left behind.
        """
        from localmoe.formats.checkpoint import Checkpoint

        target = self.new_path(name)
        checkpoint = Checkpoint.open(source)
        with build_lock(target, on_progress):
            if target.exists():
                raise ModelBuildError(
                    f"{target}: exists; choose another --name, or remove it with: localmoe models rm {name}"
                )
            with fresh_directory(target) as directory:
                _copy_companions(source, directory)
                (directory / _CHECKPOINT_LINK).symlink_to(source.resolve())
                write_model_store(checkpoint, directory, weights, on_progress)
        return target

    def checkpoint_path(self, name: str) -> Path | None:
        """The model's own weights, for engines that read checkpoints; None where they are not there any more.

        Raises:
            ModelNotFoundError: no such model.
        """
        directory = self.path(name)
        return next((path for path in (directory, directory / _CHECKPOINT_LINK) if _has_checkpoint(path)), None)

    def verify(self, name: str, on_progress: Progress) -> tuple[VerifiedPart, ...]:
        """Check every checksum of every store, and the headers and names of the checkpoint.

        Raises:
            ModelNotFoundError: no such model.
            ModelFileError: something is damaged, or there is nothing but configuration.
        """
        from localmoe.formats.checkpoint import Checkpoint
        from localmoe.formats.store import Store

        directory = self.path(name)
        parts = []
        if _has_checkpoint(directory):
            checkpoint = Checkpoint.open(directory)
            num_tensors = _check_names(checkpoint)
            size_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
            parts.append(VerifiedPart(path=directory, num_tensors=num_tensors, size_bytes=size_bytes))
        for weights in _stored_weights(directory):
            path = self.store_path(name, weights)
            with Store.open(path) as store:
                store.verify(partial(on_progress, f"checking {path.name}"))
                num_tensors = len(store.dense_names) + 3 * store.shape.num_layers * store.shape.num_experts
            parts.append(VerifiedPart(path=path, num_tensors=num_tensors, size_bytes=path.stat().st_size))
        if not parts:
            raise ModelFileError(f"{directory}: holds neither a store nor a checkpoint")
        return tuple(parts)

    def stripe(
        self,
        name: str,
        weights: WeightFormat,
        directories: Sequence[Path],
        *,
        same_file_system: bool,
        on_progress: Progress,
    ) -> tuple[Path, ...]:
        """Copy an equal share of a store's experts to each of some directories on other disks, in place of the
        stripes that the store had before. A link beside the store remembers each.

        Args:
            same_file_system: allow two shares on one.

        Returns:
            The stripes.

        Raises:
            ModelNotFoundError: no such model.
            ModelFileError: it has no such store, or that is damaged.
            ModelBuildError: a directory is not there or on no disk of its own, or there is no room.
        """
        from localmoe.formats.store import Store
        from localmoe.formats.stripes import Stripe

        store_path = self.ensure_store(name, weights, on_progress)
        _check_disks([store_path.parent, *directories], same_file_system)
        num_disks = len(directories) + 1
        paths = [
            directory.resolve() / f"{name}.{weights}.{number}-of-{num_disks}.stripe"
            for number, directory in enumerate(directories, 1)
        ]
        with build_lock(self.path(name), on_progress), Store.open(store_path) as store:
            old = {
                link: link.resolve()
                for link in _stripe_links(self.path(name))
                if link.name.startswith(f"{name}.{weights}.")
            }
            # Linked before they are written, so that none that is there is ever unknown.
            new = {store_path.parent / path.name: path for path in paths}
            _remove_stripes({link: path for link, path in old.items() if new.get(link, path) != path})
            for link, path in new.items():
                if old.get(link) != path:
                    link.symlink_to(path)
            for path in paths:
                Stripe.at(path).write(store, partial(on_progress, f"writing {path.name}"))
            _remove_stripes({link: path for link, path in old.items() if link not in new})
        return tuple(paths)

    def stripes(self, name: str) -> tuple[Path, ...]:
        """The stripes of a model's stores; none of a model that is only linked to. Raises ModelNotFoundError."""
        if self.path(name).is_symlink():
            return ()
        return tuple(link.resolve() for link in _stripe_links(self.path(name)))

    def remove(self, name: str) -> None:
        """Delete a model, everything in its directory, and its stripes. Raises ModelNotFoundError."""
        directory = self.path(name)
        with build_lock(directory, lambda *_: None):
            if directory.is_symlink():
                directory.unlink()
                return
            for path in self.stripes(name):
                path.unlink(missing_ok=True)
            # Out of sight first, so that nobody finds half a model.
            doomed = directory.with_name(f".removing-{name}")
            shutil.rmtree(doomed, ignore_errors=True)
            directory.rename(doomed)
            shutil.rmtree(doomed)

    def _names(self) -> tuple[str, ...]:
        found = self.models_path.iterdir() if self.models_path.is_dir() else ()
        return tuple(sorted(p.name for p in found if self.has(p.name)))


def is_name(name: str) -> bool:
    """Whether this can be a model's name, and so a directory's: no separators, no leading dot, not too long."""
    return _NAME.fullmatch(name) is not None


def write_model_store(
    checkpoint: "Checkpoint", directory: Path, weights: WeightFormat, on_progress: Progress
) -> None:
    """Write `stores/<weights>.store` in a model's directory, out of a checkpoint that may be elsewhere."""
    from localmoe.catalog.threads import one_thread
    from localmoe.formats.convert import write_store

    shape, names = _shape_and_names(checkpoint)
    path = directory / "stores" / f"{weights}.store"
    path.parent.mkdir(exist_ok=True)
    on_store = partial(on_progress, f"writing {path.name}")
    with one_thread():
        write_store(checkpoint, names, shape, weights, path, on_store)


def _shape_and_names(checkpoint: "Checkpoint") -> tuple[ModelShape, TensorNames]:
    """What the checkpoint's configuration says it holds."""
    from localmoe.models import architecture

    decoder = architecture(checkpoint.config)
    shape = decoder.parse_shape(checkpoint.config)
    return shape, decoder.tensor_names(shape)


def _entry(directory: Path) -> ModelEntry:
    try:
        model_type = read_json_object(directory / "config.json").get("model_type")
    except CheckpointError:
        model_type = None
    return ModelEntry(
        name=directory.name,
        path=directory,
        model_type=model_type if isinstance(model_type, str) else None,
        weights=tuple(_stored_weights(directory)),
        has_checkpoint=_has_checkpoint(directory),
        size_bytes=sum(
            file.stat().st_size
            for file in directory.rglob("*")
            if file.is_file() and file.suffix != _STRIPE_SUFFIX
        ),
    )


def _remove_stripes(stripes: Mapping[Path, Path]) -> None:
    """Delete stripes, by the links to them. Raises ModelBuildError."""
    for link, path in stripes.items():
        try:
            path.unlink(missing_ok=True)
            link.unlink()
        except OSError as error:
            raise ModelBuildError(
                f"{path}: the old stripe cannot be deleted: {error.strerror}; if its disk is gone, delete {link}"
            ) from error


def _stripe_links(directory: Path) -> list[Path]:
    """Links to the stripes of a model's stores."""
    links = (directory / "stores").glob(f"*{_STRIPE_SUFFIX}")
    return sorted(link for link in links if link.is_symlink())


def _check_disks(directories: Sequence[Path], same_file_system: bool) -> None:
    """Refuse directories that are not there, or share a disk. Raises ModelBuildError."""
    seen: dict[int, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ModelBuildError(f"{directory}: is not a directory; mount its disk, or make it, first")
        earlier = seen.setdefault(directory.stat().st_dev, directory)
        if earlier is not directory and not same_file_system:
            raise ModelBuildError(
                f"{directory}: is on the same file system as {earlier}; stripes make reading faster where each is on "
                "a disk of its own. With --force they are written all the same"
            )


def _stored_weights(directory: Path) -> Iterator[WeightFormat]:
    return (weights for weights in WeightFormat if (directory / "stores" / f"{weights}.store").is_file())


def _has_checkpoint(directory: Path) -> bool:
    return any((directory / file).exists() for file in _WEIGHT_FILES)


def _check_names(checkpoint: "Checkpoint") -> int:
    """How many tensors the architecture needs; raises CheckpointError if one is not there."""
    _, names = _shape_and_names(checkpoint)
    needed = {*names.dense.values()}.union(*names.experts.values())
    if missing := sorted(needed - checkpoint.names):
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} of {len(needed)} tensors are missing, among them {missing[0]}"
        )
    return len(needed)


def _copy_companions(source: Path, directory: Path) -> None:
    for file in _REQUIRED_FILES:
        if not (source / file).is_file():
            raise CheckpointError(
                f"{source / file}: is missing; save the model's fast tokenizer there (transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
    for file in (*_REQUIRED_FILES, *_OPTIONAL_FILES):
        if (source / file).is_file():
            if (source / file).stat().st_size > MAX_FILE_BYTES:
                raise CheckpointError(f"{source / file}: larger than {MAX_FILE_BYTES} bytes")
            shutil.copyfile(source / file, directory / file)
