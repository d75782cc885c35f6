"""Libraries that take long to import."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """What is imported inside stays for good, so the garbage collector does not look at it later, nor at anything
    meanwhile, which would take a tenth of the time. Whatever else there is at the end it leaves alone as well."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
