"""Routing traces: which experts a model's router chose, token by token, in the order of execution.

A CSV file, plain or gzip. A comment line, `# ... n_layer=30 n_expert=128 n_expert_used=6`, gives the model's sizes; a
line of column names follows, then one line for each expert that a token uses in a layer. Of the columns `turn`,
`phase` (0 prompt, 1 decoded), `step` (the token's position), `layer`, `slot` (rank, from 0) and `expert` are read.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from localmoe.core.errors import TraceError

MAX_TRACE_BYTES = 64 << 20
"""Unpacked. About two million uses."""
_MAX_LINE_BYTES = 4096
_MAX_LAYERS, _MAX_EXPERTS = 256, 2048
_COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert")


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """One layer of one step."""

    layer: int
    experts: NDArray[np.int16]
    """[tokens, experts each], the likeliest first: of all tokens of a prompt, or of one that is decoded."""
    is_prompt: bool


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    model: str
    """As the file names it, or its path."""
    num_layers: int
    num_experts: int
    """Of one layer."""
    uses: tuple[LayerUse, ...]
    """In the order of execution."""


def read_trace(path: Path) -> RoutingTrace:
    """Read a trace that may come from anywhere.

    Raises:
        TraceError: it cannot be read, is too large, or a line is not what it should be.
    """
    try:
        with path.open("rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return _Reader(path).read(cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_packed else file)
    except OSError as error:  # what is wrong with the gzip header and checksum comes as one, too
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._line = 0
        self._sizes: dict[str, str] = {}

    def read(self, file: BinaryIO) -> RoutingTrace:
        rows = self._rows(file)
        columns = next(rows, None)
        if columns is None:
            self._fail("no column names")
        missing = [name for name in _COLUMNS if name not in columns]
        if missing:
            self._fail(f"no column {missing[0]!r}; the columns must be {', '.join(_COLUMNS)}")
        num_layers = self._size("n_layer", _MAX_LAYERS)
        num_experts = self._size("n_expert", _MAX_EXPERTS)
        num_used = self._size("n_expert_used", num_experts)
        order = [columns.index(name) for name in _COLUMNS]
        bounds = (2**31, 2, 2**31, num_layers, num_used, num_experts)
        values = (self._values(row, len(columns), order, bounds) for row in rows)
        uses = tuple(self._uses(self._tokens(values, num_used)))
        if all(use.is_prompt for use in uses):
            self._fail("the trace ends without a decoded token (phase 1)")
        return RoutingTrace(
            model=self._sizes.get("model", str(self._path)),
            num_layers=num_layers,
            num_experts=num_experts,
            uses=uses,
        )

    def _rows(self, file: BinaryIO) -> Iterator[list[str]]:
        """Fields of the lines that are no comments."""
        num_bytes = 0
        while raw := self._read_line(file):
            self._line += 1
            num_bytes += len(raw)
            if len(raw) > _MAX_LINE_BYTES:
                self._fail(f"longer than {_MAX_LINE_BYTES} bytes")
            if num_bytes > MAX_TRACE_BYTES:
                self._fail(f"the trace is larger than {MAX_TRACE_BYTES} bytes")
            if not raw.isascii():
                self._fail("not plain text")
            line = raw.decode("ascii").strip()
            if line.startswith("#"):
                self._sizes.update(re.findall(r"(\w+)=(\S+)", line))
            elif line:
                yield line.split(",")

    def _read_line(self, file: BinaryIO) -> bytes:
        try:
            return file.readline(_MAX_LINE_BYTES + 1)
        except (EOFError, zlib.error) as error:
            self._line += 1
            self._fail(f"the gzip file is damaged: {error}")

    def _size(self, name: str, most: int) -> int:
        text = self._sizes.get(name)
        if text is None:
            self._fail(f"no comment before it says {name}=...")
        if not (text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
            self._fail(f"{name} is {text!r}, not a number from 1 to {most}")
        return int(text)

    def _values(
        self, row: list[str], num_columns: int, order: list[int], bounds: tuple[int, ...]
    ) -> tuple[int, ...]:
        if len(row) != num_columns:
            self._fail(f"{len(row)} fields instead of {num_columns}")
        values = []
        for name, index, bound in zip(_COLUMNS, order, bounds, strict=True):
            text = row[index]
            if not (text.isdigit() and len(text) <= 10 and int(text) < bound):
                self._fail(f"{name} is {text!r}, not a number from 0 to {bound - 1}")
            values.append(int(text))
        return tuple(values)

    def _tokens(
        self, rows: Iterator[tuple[int, ...]], num_used: int
    ) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """((turn, phase, step, layer), experts) of each token in each layer."""
        token: tuple[int, ...] = ()
        experts: list[int] = []
        for *key, slot, expert in rows:
            if not experts:
                token = tuple(key)
            if tuple(key) != token or slot != len(experts):
                self._fail(
                    f"turn, phase, step, layer and slot are {(*key, slot)}, but after the lines before it they "
                    f"must be {(*token, len(experts))}"
                )
            if expert in experts:
                self._fail(f"expert {expert} is named again for the same token and layer")
            experts.append(expert)
            if len(experts) == num_used:
                yield token, experts
                experts = []
        if experts:
            self._fail(f"the trace ends within a token, after {len(experts)} of its {num_used} experts")

    def _uses(self, tokens: Iterator[tuple[tuple[int, ...], list[int]]]) -> Iterator[LayerUse]:
        """Tokens of a prompt that pass a layer one after another, together; decoded ones each by itself."""
        step: tuple[int, ...] = ()
        together: list[list[int]] = []
        for (turn, phase, position, layer), experts in tokens:
            following = (turn, phase, layer, position if phase else -1)
            if together and following != step:
                yield _layer_use(step, together)
                together = []
            step = following
            together.append(experts)
        if together:
            yield _layer_use(step, together)

    def _fail(self, what: str) -> NoReturn:
        raise TraceError(f"{self._path}: line {self._line}: {what}")


def _layer_use(step: tuple[int, ...], experts: list[list[int]]) -> LayerUse:
    _, phase, layer, _ = step
    return LayerUse(layer=layer, experts=np.array(experts, np.int16), is_prompt=phase == 0)
