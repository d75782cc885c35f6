"""How much may be read ahead: what the disk has time for while the processor computes."""

import math

_WEIGHT = 0.1
"""Of the newest layer in the running means; about one token's layers."""


class IdleLink:
    """Measures one link from what passes over it while serving.

    While a layer computes, the disk has time for some reads. Reading ahead more than that cannot save time: the
    layers would wait for the disk all the same, and what is read for nothing would delay what is needed.
    """

    def __init__(self) -> None:
        self._compute_s = 0.0
        self._read_s: float | None = None
        self._busy_s = 0.0
        self._num_reads = 0

    @property
    def most_reads_ahead(self) -> int:
        """Reads that the disk can do while a layer computes; at least one, so that it need not stand still."""
        return math.ceil(self._compute_s / self._read_s) if self._read_s else 1

    def observe(self, compute_s: float, busy_s: float, num_reads: int) -> None:
        """A layer has ended.

        Args:
            compute_s: it took, without waiting for the disk.
            busy_s: since start, in which the disk had something to read.
            num_reads: since start.
        """
        self._compute_s += _WEIGHT * (compute_s - self._compute_s)
        if num_reads > self._num_reads:
            read_s = (busy_s - self._busy_s) / (num_reads - self._num_reads)
            self._read_s = read_s if self._read_s is None else self._read_s + _WEIGHT * (read_s - self._read_s)
            self._busy_s, self._num_reads = busy_s, num_reads
