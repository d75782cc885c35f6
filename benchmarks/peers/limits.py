"""Memory limits for single commands, by control groups."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peers.process import PeerError

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[list[str]]:
    """A group with this limit, page cache included and no swap, and the words that start a command inside.

    Raises:
        PeerError: there is no such thing here, as for want of root.
    """
    version_1 = (_ROOT / "memory").is_dir()
    group = (_ROOT / "memory" if version_1 else _ROOT) / f"localmoe-{os.getpid()}"
    limit, swap = (
        ("memory.limit_in_bytes", "memory.swappiness") if version_1 else ("memory.max", "memory.swap.max")
    )
    try:
        if not version_1:
            (_ROOT / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / limit).write_text(str(limit_bytes))
        with suppress(OSError):  # a kernel without swap has no such file
            (group / swap).write_text("0")
    except OSError as error:
        raise PeerError(f"{group}: a memory limit needs root and control groups: {error}") from error
    try:
        # The shell joins the group and becomes the command, so that nothing else is in it.
        yield ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(group / "cgroup.procs")]
    finally:
        group.rmdir()


def memory_taken_bytes(group: Path) -> int:
    """What the programs in a group have taken, without the pages of files, which the kernel takes back."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(fields["total_rss"] if "total_rss" in fields else fields["anon"])


def forget_pages(path: Path) -> None:
    """Drop a file's pages from memory: pages that are there already are charged to nobody, whatever the limit."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
