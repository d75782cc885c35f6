"""Writing files so that a reader, or a power cut, finds the old or the new one whole."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from localmoe.core.errors import StorageError, StorageFullError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's contents, or make it; its owner and permissions stay. A link stays one: what it leads to is
    replaced.

    A file that is mounted by itself, as Docker does, cannot be replaced, only overwritten, which is then done.

    Raises:
        OSError: the disk is full, or it may not be written. What was there still is.
    """
    target = path.resolve()
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        write_new(new, data)
        if target.exists():
            _give_to_the_same(new, target.stat())
        new.replace(target)
    except OSError as error:
        new.unlink(missing_ok=True)
        if error.errno != errno.EBUSY:
            raise
        overwrite(target, data)
        return
    sync_folder(target.parent)


@contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Change files of these folders while no other process does that does this first."""
    with ExitStack() as stack:
        for folder in sorted(
            {folder.resolve() for folder in folders}
        ):  # in one order, so that nobody waits for ever
            with suppress(OSError):  # writing will say what is wrong with it; and some file systems have no locks
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def storage_error(error: OSError, message: str) -> StorageError:
    """What could not be written, in our own words."""
    kind = StorageFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(message)


def write_new(path: Path, data: bytes) -> None:
    """Make a file, readable by its owner only, that is on the disk when this returns. Raises OSError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """What was renamed in a folder is on the disk when this returns. Raises OSError."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def overwrite(path: Path, data: bytes) -> None:
    """Change a file's contents where they are; for readers not at once. Raises OSError."""
    with path.open("r+b") as file:
        # The room is taken first, so that a full disk is known before anything is lost.
        if len(data) > file.seek(0, os.SEEK_END):
            os.posix_fallocate(file.fileno(), 0, len(data))
        file.seek(0)
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _give_to_the_same(path: Path, before: os.stat_result) -> None:
    with suppress(PermissionError):  # to others, only root can; then it is ours
        os.chown(path, before.st_uid, before.st_gid)
    path.chmod(before.st_mode & 0o7777)
