"""Writes down which experts the router chooses, for `localmoe bench cache` and for whoever studies routing.

A file as `residency.trace` reads it. What is buffered is written when a step begins a second later, or nothing is
left to do: as whole tokens, in one call that has a gzip member of its own, so that the file of an engine that was
killed can be read. `residency` is 1 where the expert was in memory when its layer asked for it; `expert_bytes`
is what was read for it, told once in a step.
"""

import contextlib
import errno
import gzip
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.model import ModelShape
from localmoe.core.plans import SequenceStep
from localmoe.residency.trace import MAX_TRACE_BYTES

logger = logging.getLogger(__name__)

_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
_BUFFER_BYTES = 256 << 10
"""Written when there is so much, a layer more at the most."""
_LONGEST_BUFFERED_S = 1.0
_MOST_FILES = 10_000
_MAX_NUMBER = 2**31
"""That a turn may have."""


class RoutingRecorder:
    """Records every token of every layer until the disk is full or the file as large as may be read.

    Nothing that happens to the file harms the engine: recording ends with a warning.

    Args:
        path: compressed where the name ends in `.gz`. What exists is left alone: a number is put into the name.
        model: the name it is served under.
        expert_bytes: size of one expert.
        max_bytes: of the file, unpacked.
    """

    def __init__(
        self, path: Path, model: str, shape: ModelShape, expert_bytes: int, *, max_bytes: int = MAX_TRACE_BYTES
    ) -> None:
        self._expert_bytes = expert_bytes
        self._max_bytes = max_bytes
        self._is_packed = path.name.endswith(".gz")
        self._prefixes: list[str] = []
        """Of the step's tokens: the columns that all their lines begin with."""
        self._lines: list[str] = []
        self._buffered_bytes = 0
        self._unpacked_bytes = 0
        self._file_bytes = 0
        self._written_s = time.monotonic()
        name = "".join(c if c.isascii() and c.isprintable() and c != " " else "_" for c in model)[:200]
        self._path: Path | None = None
        try:
            self._path = _create(path)
        except OSError as error:
            logger.warning("routing is not recorded: %s: %s", path, error.strerror)
            return
        logger.info("routing is recorded in %s", self._path)
        self._add(
            [
                "# localmoe routing trace\n",
                f"# model={name} n_layer={shape.num_layers} n_expert={shape.num_experts} "
                f"n_expert_used={shape.top_k}\n",
                _COLUMNS,
            ]
        )

    @property
    def is_on(self) -> bool:
        """Whether it records; once it does not, it never does again."""
        return self._path is not None

    def begin_step(self, steps: Sequence[SequenceStep]) -> None:
        """The tokens of the layers that follow are those of these sequences, one after the other."""
        if self._path is None:
            return
        self._prefixes = [
            f"{step.sequence_id % _MAX_NUMBER},{int(not step.computes_prompt)},{position},"
            for step in steps
            for position in range(step.start, step.start + len(step.token_ids))
        ]
        if time.monotonic() - self._written_s > _LONGEST_BUFFERED_S:
            self.flush()

    def record(self, layer: int, ids_TK: Tensor, weights_TK: Tensor, present_E: NDArray[np.bool_]) -> None:
        """A layer is about to be computed.

        Args:
            ids_TK: what the router chose, the likeliest first.
            present_E: whether each expert of the layer is in memory.
        """
        if self._path is None:
            return
        sources = ["1,0" if present else f"0,{self._expert_bytes}" for present in present_E.tolist()]
        lines = []
        for prefix, ids, weights in zip(self._prefixes, ids_TK.tolist(), weights_TK.tolist(), strict=True):
            for slot, (expert, weight) in enumerate(zip(ids, weights, strict=True)):
                lines.append(f"{prefix}{layer},{slot},{expert},{weight:.6g},{sources[expert]}\n")
                if sources[expert] != "1,0":
                    sources[expert] = "0,0"  # who comes after need not read it again
        self._add(lines)
        if self._buffered_bytes >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        lines, self._lines = self._lines, []
        self._buffered_bytes = 0
        self._written_s = time.monotonic()
        if self._path is None or not lines:
            return
        content = "".join(lines).encode("ascii")
        self._unpacked_bytes += len(content)
        if self._unpacked_bytes > self._max_bytes:
            self._stop(f"{self._max_bytes} bytes are enough")
            return
        if self._is_packed:
            content = gzip.compress(content, compresslevel=1)
        try:
            with self._path.open("r+b", buffering=0) as file:
                file.seek(self._file_bytes)
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._file_bytes += len(content)
        except OSError as error:
            self._stop(error.strerror)

    def _add(self, lines: list[str]) -> None:
        self._lines += lines
        self._buffered_bytes += sum(map(len, lines))

    def _stop(self, reason: str | None) -> None:
        """Leave the file as it was after the last write that went well."""
        assert self._path is not None
        logger.warning("routing is no longer recorded in %s: %s", self._path, reason)
        with contextlib.suppress(OSError):  # it may be gone
            os.truncate(self._path, self._file_bytes)
        self._path = None


def _create(path: Path) -> Path:
    """A new file of this name, or the next that is free. Raises OSError."""
    suffix = ".gz" if path.name.endswith(".gz") else ""
    inner = path.with_name(path.name.removesuffix(suffix))
    for number in range(1, _MOST_FILES):
        numbered = path if number == 1 else path.with_name(f"{inner.stem}.{number}{inner.suffix}{suffix}")
        with contextlib.suppress(FileExistsError):
            numbered.touch(exist_ok=False)
            return numbered
    raise FileExistsError(errno.EEXIST, f"and so do {_MOST_FILES - 2} numbered ones")
