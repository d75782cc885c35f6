"""What levels keep outside this process's memory: data with its time and a checksum.

What is read back is data of known types (MessagePack), whoever wrote it, and never code.
"""

import struct

import xxhash

_MAGIC = b"LMC1"
_HEADER = struct.Struct("<4sQd")
"""Magic, XXH3 of all that follows, Unix time."""
SEAL_BYTES = _HEADER.size
_MAX_SKEW_S = 60.0
"""How far the clock of another gateway may be ahead."""


def seal(data: bytes, now_s: float) -> bytes:
    """Data as it is kept."""
    return _HEADER.pack(_MAGIC, _checksum(data, now_s), now_s) + data


def unseal(sealed: bytes, *, now_s: float, ttl_s: float) -> bytes | None:
    """The data; None: it is damaged, or too old."""
    if len(sealed) < SEAL_BYTES:
        return None
    magic, checksum, sealed_s = _HEADER.unpack_from(sealed)
    data = sealed[SEAL_BYTES:]
    if magic != _MAGIC or checksum != _checksum(data, sealed_s):
        return None
    return data if -_MAX_SKEW_S <= now_s - sealed_s < ttl_s else None


def _checksum(data: bytes, sealed_s: float) -> int:
    hasher = xxhash.xxh3_64(struct.pack("<d", sealed_s))
    hasher.update(data)
    return hasher.intdigest()
