"""Kernels for the CPU."""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


def levels() -> list[str]:
    """
    Levels of instructions that this machine was seen to compute with, lowest first.
    """

MAX_TOP_K: int = 64

class Matrix:
    def __init__(self, format: str, rows: int, columns: int, values: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], scales: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], tensor_scale: float) -> None: ...

class Attention:
    def __init__(self, norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], q: Matrix, k: Matrix, v: Matrix, o: Matrix, q_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, k_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, num_heads: int, num_kv_heads: int, eps: float) -> None: ...

class Experts:
    def __init__(self, format: str, num_experts: int, hidden_size: int, expert_size: int) -> None: ...

    def place(self, id: int, gate: Matrix, up: Matrix, down: Matrix) -> None: ...

    def remove(self, id: int) -> None: ...

class Runtime:
    def __init__(self, level: str, num_threads: int, pin: bool = False) -> None: ...

    def embed(self, matrix: Matrix, ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    def linear(self, matrix: Matrix, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    def logits(self, norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], eps: float, head: Matrix, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    def attention(self, weights: Attention, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')], values: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')], bf16: bool, block_tokens: int, spans: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], slots: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], cosines: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], sines: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    def route(self, norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], eps: float, router: Matrix, normalize: bool, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], h: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], ids: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu')], weights: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    def norm(self, weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], eps: float, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], h: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    def moe(self, experts: Experts, h: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    def moe_begin(self, experts: Experts, h: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None: ...

    def moe_compute(self, experts: Experts, ids: Sequence[int]) -> None: ...

    def moe_finish(self, experts: Experts, weights: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    def draw(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], temperatures: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], top_k: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], top_p: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], min_p: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], uniforms: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

    def read(self, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> int: ...

END_OF_FILE: int = -1

class DiskReader:
    def __init__(self, files: Sequence[int], queue_depth: int, method: str, piece_bytes: int) -> None: ...

    def register_buffers(self, buffers: Sequence[tuple[int, int]]) -> int:
        """
        Pins memory, as (address, num_bytes), in place of what was pinned before. Returns 0 or an errno.
        """

    def submit(self, reads: Sequence[tuple[int, int, int, int, int]]) -> None:
        """
        Begins reads: (tag, index of the file, offset, num_bytes, address). Their memory must last.
        """

    def wait(self, min_completed: int, timeout_s: float) -> list[tuple[int, int]]:
        """
        Returns (tag, status) of what has ended since the last call; the status is 0, an errno or
        END_OF_FILE. Waits until that many have ended, the time is up, or nothing more is under way.
        """

    def cancel(self, tags: Sequence[int]) -> list[int]:
        """Drops the reads that have not begun and returns their tags."""

    def close(self) -> None:
        """Waits for what the kernel is reading."""

    @property
    def in_flight(self) -> int: ...

    @property
    def num_reads(self) -> int: ...

    @property
    def bytes_read(self) -> int: ...

    @property
    def busy_s(self) -> float: ...
