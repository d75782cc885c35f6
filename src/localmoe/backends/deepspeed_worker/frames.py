"""Messages over a pipe: four bytes of length, then MessagePack."""

import struct
from typing import IO, TypeVar

import msgspec

_LENGTH = struct.Struct("<I")

T = TypeVar("T")


def write_frame(pipe: IO[bytes], message: object) -> None:
    """Send one message, all of it.

    Raises:
        OSError: nobody reads.
    """
    data = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def read_frame(pipe: IO[bytes], kind: type[T]) -> T:
    """Wait for one message.

    Raises:
        EOFError: the other side has closed.
    """
    return msgspec.msgpack.decode(_read(pipe, _LENGTH.unpack(_read(pipe, _LENGTH.size))[0]), type=kind)


def _read(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data
