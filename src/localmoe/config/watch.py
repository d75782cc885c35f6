"""Says when files have changed.

What is watched are the folders that the files and what they are links to are in: editors put new files into the place
of old ones, and Kubernetes turns a link to a whole folder. A change is told when the files have stayed as they are
for a moment, so that one that is being written is not read by halves.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

from watchfiles import awatch

logger = logging.getLogger(__name__)

_SETTLED_S = 0.2
"""Files that nobody has changed for so long are complete."""
_SETTLE_TIMES = 50
"""A file that somebody writes to all the time is read after so many looks all the same."""
_AGAIN_S = 5.0
"""Before a folder that cannot be watched is tried again, as where it is gone."""

_State = tuple[tuple[int, ...] | None, ...]


async def changes(
    files: Callable[[], Sequence[Path]], *, poll_interval_s: float | None
) -> AsyncGenerator[None, None]:
    """Yields at first, and whenever one of the files has changed. Never ends by itself.

    Args:
        files: asked anew after each change.
        poll_interval_s: look so often; None: be told by the system.
    """
    before = await _quiet(files)
    yield  # what has changed since they were read is no change from now on
    while True:
        try:
            folders = await asyncio.to_thread(_folders, files())
            watching = awatch(
                *folders,
                watch_filter=None,
                recursive=False,
                force_polling=poll_interval_s is not None,
                poll_delay_ms=max(1, int((poll_interval_s or 1) * 1000)),
                # What has changed before it began to watch is seen after a while.
                rust_timeout=int(_AGAIN_S * 1000),
                yield_on_timeout=True,
            )
            async with aclosing(watching) as events:
                async for _ in events:
                    if await asyncio.to_thread(_state, files()) != before:
                        before = await _quiet(files)
                        yield
                    if await asyncio.to_thread(_folders, files()) != folders:
                        break
        except (OSError, RuntimeError) as error:  # what the system says, and what the library makes of it
            logger.warning("%s cannot be watched: %s", ", ".join(map(str, files())), error)
            await asyncio.sleep(_AGAIN_S)


async def _quiet(files: Callable[[], Sequence[Path]]) -> _State:
    """The files' state, once it stays."""
    now = await asyncio.to_thread(_state, files())
    for _ in range(_SETTLE_TIMES):
        await asyncio.sleep(_SETTLED_S)
        before, now = now, await asyncio.to_thread(_state, files())
        if now == before:
            break
    return now


def _state(files: Sequence[Path]) -> _State:
    return tuple(_identity(file) for file in files)


def _identity(file: Path) -> tuple[int, ...] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _folders(files: Sequence[Path]) -> list[Path]:
    """That exist; a file's own folder is there, or was."""
    found = {folder for file in files for folder in (file.parent, file.resolve().parent)}
    return sorted(folder for folder in found if folder.is_dir()) or sorted({file.parent for file in files})
