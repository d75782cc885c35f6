"""Which version of the layout a store's file has: free of torch, for those who only want to know that."""

import struct
from pathlib import Path

STORE_MAGIC = b"LMOESTOR"
LAYOUT_VERSION = 3


def stored_version(path: Path) -> int | None:
    """The layout version that a file claims; None if it is no store or cannot be read."""
    try:
        with path.open("rb") as file:
            magic, version = struct.unpack("<8sQ", file.read(16))
    except (OSError, struct.error):
        return None
    return int(version) if magic == STORE_MAGIC else None
