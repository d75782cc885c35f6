"""Stripes: copies of a store's experts on other disks, so that all the disks read at once.

A stripe has the store's size and its offsets, and of its content the header and a share of the blobs; the rest is a
hole that takes no room. Experts are numbered layer by layer: stripe K of N disks holds those whose number leaves the
rest K when divided by N. The store is disk 0 and complete, so whatever happens to a stripe, nothing is lost. Which
share a stripe holds is in its name: `ANYTHING.K-of-N.stripe`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from localmoe.core.errors import ModelBuildError, StripeError
from localmoe.core.model import ExpertId
from localmoe.formats.store import Store
from localmoe.formats.store_writer import complete, create_partial, remove_abandoned, write_all

_NAME = re.compile(r".+\.([1-9][0-9]{0,2})-of-([1-9][0-9]{0,2})\.stripe")


@dataclass(frozen=True, kw_only=True)
class Stripe:
    """A share of a store's experts."""

    path: Path
    index: int
    """From 1, below `num_disks`."""
    num_disks: int
    """With the store's."""

    @classmethod
    def at(cls, path: Path) -> "Stripe":
        """The share that a path names. Raises StripeError."""
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[1]) >= int(match[2]):
            raise StripeError(f"{path}: is not named like a stripe, as model.nvfp4.1-of-2.stripe")
        return cls(path=path, index=int(match[1]), num_disks=int(match[2]))

    @classmethod
    def open(cls, path: Path, store: Store) -> "Stripe":
        """A stripe that is there and the store's; its experts are checked as they are read.

        Raises:
            StripeError: it cannot be read, or is not of this store.
            StoreError: the store's header cannot be read any more.
        """
        stripe, header = cls.at(path), store.encoded_header()
        try:
            with path.open("rb") as file:
                found, file_bytes = file.read(len(header)), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise StripeError(f"{path}: cannot be opened: {error.strerror}") from error
        if found != header or file_bytes != store.total_bytes:
            raise StripeError(
                f"{path}: is not a stripe of {store.path}, which may have been made anew since; write its stripes "
                "again with: localmoe models stripe"
            )
        return stripe

    def experts(self, store: Store) -> list[ExpertId]:
        """What it holds."""
        shape = store.shape
        numbers = range(self.index, shape.num_layers * shape.num_experts, self.num_disks)
        return [ExpertId(*divmod(number, shape.num_experts)) for number in numbers]

    def write(self, store: Store, on_progress: Callable[[int, int], None]) -> None:
        """Copy the share out of a store, checking it; the file has its name only when it is complete.

        Args:
            on_progress: called with the bytes copied so far and their total.

        Raises:
            ModelBuildError: there is not enough room, or a write failed.
            ChecksumError: the store is damaged.
        """
        experts = self.experts(store)
        total_bytes = len(experts) * store.blob_bytes
        try:
            remove_abandoned(self.path)
            room = os.statvfs(self.path.parent)
            if (free_bytes := room.f_bavail * room.f_frsize) < total_bytes:
                raise ModelBuildError(
                    f"{self.path}: needs {total_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free there"
                )
            partial, fd = create_partial(self.path)
            try:
                os.ftruncate(fd, store.total_bytes)
                for number, expert in enumerate(experts, 1):
                    write_all(fd, store.expert_blob(expert).numpy().data, store.expert_entry(expert).offset)
                    on_progress(number * store.blob_bytes, total_bytes)
                write_all(fd, memoryview(store.encoded_header()), 0)
                complete(partial, fd, self.path)
            finally:
                os.close(fd)
                partial.unlink(missing_ok=True)  # gone if it was renamed
        except OSError as error:
            raise ModelBuildError(f"{self.path}: writing the stripe failed: {error.strerror}") from error
