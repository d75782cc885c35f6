"""Where more threads make it slower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, for work that is thousands of small operations.

    Split over threads, each of them waits for the slowest; on a busy machine that made fitting and FP4 conversion
    ten times slower, on an idle one hardly faster.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
