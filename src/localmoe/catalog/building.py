"""How a model comes to be seen: under a lock, in a hidden sibling directory, renamed when it is whole.

One builder per name: the lock is `flock` on `.locks/<name>.lock`, which the kernel releases when its holder dies,
however it dies. Whoever holds it owns the sibling `.building-<name>` and may delete what a killed builder left
there. Readers take no lock: a directory or store that has its final name is whole.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from localmoe.core.errors import ModelBuildError

Progress = Callable[[str, int, int], None]
"""Told of (stage, done, total); a total of 0 means that it is not known."""


@contextmanager
def build_lock(target: Path, on_progress: Progress) -> Iterator[None]:
    """Hold the only right to build or remove `target`, waiting for another process that has it.

    Raises:
        ModelBuildError: the directory of models cannot be written to.
    """
    locks = target.parent / ".locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        file = (locks / f"{target.name}.lock").open("w")
    except OSError as error:
        raise ModelBuildError(f"{target}: cannot be built or removed: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress(f"waiting for another process that works on {target.name}", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def fresh_directory(target: Path) -> Iterator[Path]:
    """An empty directory that becomes `target` if the block succeeds, and vanishes if it does not.

    The caller holds the `build_lock` of `target`.

    Raises:
        ModelBuildError: something else is at `target`, or the file system refused something (a full disk).
    """
    if target.exists():
        raise ModelBuildError(f"{target}: is in the way of the model to be built; move or delete it")
    directory = target.with_name(f".building-{target.name}")
    shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.mkdir()
        yield directory
        _sync(directory)
        directory.rename(target)
    except OSError as error:
        raise ModelBuildError(f"{target}: cannot be built: {error}; nothing of it was kept") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Wait until the disk has everything, so that no crash can show a renamed directory with empty files."""
    for path in (*directory.rglob("*"), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
