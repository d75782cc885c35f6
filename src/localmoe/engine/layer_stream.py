"""Attention weights of layers that do not fit in memory, read in time for each step.

Every step passes through the layers in the same order, so what is needed next is known: streamed layers take turns in
a few buffers, and as soon as one has been computed, its buffer is filled with the one that will need it next, be that
in the next step. While there is one buffer more than in use, the disk is never idle. A step that fails leaves other
layers in the buffers than the next one expects; it finds out and reads again.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from localmoe.core.errors import ChecksumError, StoreError
from localmoe.formats.packed import PackedMatrix
from localmoe.formats.store import Store, find_damage, matrix_in
from localmoe.formats.store_layout import DenseEntry
from localmoe.kernels.base import Attention, PagedStep
from localmoe.tiers.disk import DiskReader, Done, Read
from localmoe.tiers.host import HostArena

STREAMED = ("q", "k", "v", "o")
"""The parts of a layer that are streamed; its norms and router are small and stay."""
NUM_BUFFERS = 2


def streamed_entries(entries: Iterable[DenseEntry], layer: int) -> list[DenseEntry]:
    """The extents of a layer that are streamed; they lie one after the other in the file."""
    names = {f"layers.{layer}.{part}" for part in STREAMED}
    return [entry for entry in entries if entry.name in names]


class LayerStream:
    """The streamed layers of a store. One thread uses it.

    Args:
        layers: in ascending order; a multiple of `NUM_BUFFERS`, so that each always has the same buffer.
        reader: of the store's file, for nothing else.

    Raises:
        EngineStartError: the memory is not to be had.
    """

    def __init__(
        self, store: Store, layers: Sequence[int], reader: DiskReader[int], available_memory_bytes: int
    ) -> None:
        assert len(layers) % NUM_BUFFERS == 0
        self._path = store.path
        self._reader = reader
        self._entries = {layer: streamed_entries(store.dense_entries, layer) for layer in layers}
        num_bytes = sum(entry.num_bytes for entry in self._entries[layers[0]])
        self._arena = HostArena(num_bytes, NUM_BUFFERS, available_memory_bytes=available_memory_bytes)
        self._layers = list(layers)
        self._turn = {layer: turn for turn, layer in enumerate(layers)}
        self._owners: list[int | None] = [None] * NUM_BUFFERS
        """By buffer: whose weights are in it, or on their way."""
        self._present = [False] * NUM_BUFFERS
        """By buffer: whether they are in it."""

    def matrices(self) -> dict[str, PackedMatrix]:
        """By name, where they lie while their layer is computed."""
        found = {}
        for layer, entries in self._entries.items():
            start = 0
            for entry in entries:
                content = self._arena.slot(self._buffer(layer))[start : start + entry.num_bytes]
                found[entry.name] = matrix_in(content, entry)
                start += entry.num_bytes
        return found

    def attention(self, layer: int, attend: Attention) -> Attention:
        """The same operation, once the layer's weights are here."""

        def attend_when_here(x_TD: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, step: PagedStep) -> None:
            self._wait(layer)
            attend(x_TD, keys_NGdB, values_NGBd, step)
            self._fetch(self._layers[(self._turn[layer] + NUM_BUFFERS) % len(self._layers)])

        return attend_when_here

    def _buffer(self, layer: int) -> int:
        return self._turn[layer] % NUM_BUFFERS

    def _fetch(self, layer: int) -> None:
        """Begin to read a layer into its buffer, which nothing is being read into."""
        buffer, entries = self._buffer(layer), self._entries[layer]
        self._owners[buffer], self._present[buffer] = layer, False
        num_bytes = sum(entry.num_bytes for entry in entries)
        self._reader.submit(
            [Read(key=layer, offset=entries[0].offset, num_bytes=num_bytes, buffer=self._arena.slot(buffer))]
        )

    def _wait(self, layer: int) -> None:
        """Return once a layer's weights are in its buffer.

        Raises:
            StoreError: they cannot be read.
            ChecksumError: they are damaged.
        """
        buffer = self._buffer(layer)
        while not (self._owners[buffer] == layer and self._present[buffer]):
            if self._owners[buffer] is None or self._present[buffer]:
                self._fetch(layer)
            failures = [self._take(read) for read in self._reader.collect(wait=True)]
            for failure in filter(None, failures):
                # Whichever layer it was: the next step would meet it, too.
                raise failure

    def _take(self, read: Done[int]) -> StoreError | None:
        """Note that a layer is here, or say why not; then it will be read again when it is needed."""
        buffer = self._buffer(read.key)
        self._owners[buffer] = None
        if read.error is not None:
            return StoreError(read.error)
        start = 0
        for entry in self._entries[read.key]:
            if damage := find_damage(read.buffer[start : start + entry.num_bytes], entry):
                return ChecksumError(f"{self._path}: {damage}")
            start += entry.num_bytes
        self._owners[buffer], self._present[buffer] = read.key, True
        return None
