"""Dense weights in memory of their own, for engines that do not map the store."""

from collections.abc import Mapping

from torch import Tensor

from localmoe.core.errors import ChecksumError, StoreError
from localmoe.formats.packed import PackedMatrix
from localmoe.formats.store import Store, find_damage, matrix_in, vector_in
from localmoe.tiers.disk import DiskReader, Read
from localmoe.tiers.host import HostArena


class LoadedDense:
    """Dense tensors of a store, read into one slab.

    Args:
        elsewhere: matrices that are not to be read, and where they are.

    Raises:
        StoreError: one cannot be read.
        ChecksumError: names every damaged one.
        EngineStartError: the memory is not to be had.
    """

    def __init__(
        self,
        store: Store,
        reader: DiskReader[str],
        elsewhere: Mapping[str, PackedMatrix],
        available_memory_bytes: int,
    ) -> None:
        self._elsewhere = elsewhere
        self._entries = {entry.name: entry for entry in store.dense_entries if entry.name not in elsewhere}
        total_bytes = sum(entry.num_bytes for entry in self._entries.values())
        slab = HostArena(total_bytes, 1, available_memory_bytes=available_memory_bytes)
        self._contents: dict[str, Tensor] = {}
        start = 0
        for entry in self._entries.values():
            self._contents[entry.name] = slab.memory[start : start + entry.num_bytes]
            start += entry.num_bytes
        reader.submit(
            Read(key=name, offset=entry.offset, num_bytes=entry.num_bytes, buffer=self._contents[name])
            for name, entry in self._entries.items()
        )
        damages = []
        while reads := reader.collect(wait=True):
            for read in reads:
                if read.error is not None:
                    raise StoreError(read.error)
                damages += [find_damage(read.buffer, self._entries[read.key])]
        if any(damages):
            raise ChecksumError(f"{store.path}: {'; '.join(filter(None, damages))}")

    def dense_matrix(self, name: str) -> PackedMatrix:
        if name in self._elsewhere:
            return self._elsewhere[name]
        return matrix_in(self._contents[name], self._entries[name])

    def dense_vector(self, name: str) -> Tensor:
        return vector_in(self._contents[name], self._entries[name])
