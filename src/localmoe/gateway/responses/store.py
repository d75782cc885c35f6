"""Responses that are kept in memory."""

from collections import OrderedDict

_ENTRY_BYTES = 512
"""About what an entry takes beside its data."""


class MemoryResponseStore:
    """Keeps what was asked for last, as much as there is room for. A `ResponseStore`.

    Args:
        max_bytes: of all responses together. One that is larger is not kept.
    """

    def __init__(self, *, max_bytes: int = 64 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    async def put(self, owner: str, response_id: str, data: bytes) -> None:
        """See `ResponseStore.put`."""
        await self.delete(owner, response_id)
        self._entries[owner, response_id] = data
        self._num_bytes += len(data) + _ENTRY_BYTES
        while self._num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._num_bytes -= len(oldest) + _ENTRY_BYTES

    async def get(self, owner: str, response_id: str) -> bytes | None:
        """See `ResponseStore.get`."""
        data = self._entries.get((owner, response_id))
        if data is not None:
            self._entries.move_to_end((owner, response_id))
        return data

    async def delete(self, owner: str, response_id: str) -> bool:
        """See `ResponseStore.delete`."""
        data = self._entries.pop((owner, response_id), None)
        if data is None:
            return False
        self._num_bytes -= len(data) + _ENTRY_BYTES
        return True
