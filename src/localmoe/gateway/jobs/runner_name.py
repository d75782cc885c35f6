"""What a gateway calls itself, where several share their jobs."""

import fcntl
import hashlib
import os
import platform
import uuid
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class RunnerName:
    """A name that stays the same over restarts, so that what was under way before one is taken up again at once,
    and that no other process has at the same time: it is made of what is in a file, which whoever has the name keeps
    locked, and of where that file is, for a copy of it may be in another directory, container or machine. A further
    server of the same home directory gets a name for this once.

    Args:
        path: of the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO | None = None
        self.name = f"once-{uuid.uuid4().hex}"
        with suppress(OSError):
            self.name = self._kept_name(path)

    def release(self) -> None:
        """Let another process have it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _kept_name(self, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")  # noqa: SIM115 (held while the name is)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            name = file.read(64).decode("ascii", "replace").strip()
            if not name:
                name = f"gateway-{uuid.uuid4().hex}"
                file.write(name.encode())
                file.flush()
        except OSError:
            file.close()
            raise
        self._file = file
        return f"{name}-{_place(file)}"


def _place(file: BinaryIO) -> str:
    """Where a file is, and since which start of the machine: that tells clones of one apart, too."""
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else ""
    status = os.fstat(file.fileno())
    told = f"{boot}/{platform.node()}/{status.st_dev}/{status.st_ino}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]
