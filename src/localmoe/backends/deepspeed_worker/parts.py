"""What DeepSpeed compiles of itself, which takes minutes: when it is installed, and at a start what is not there.

A compiler that was killed leaves a lock of torch's behind, for which everybody would wait for ever. So whoever
compiles or loads such parts holds a lock that ends with its process, and torch's are removed under it.
"""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from localmoe.core.errors import EngineStartError

_FOLDER = Path(sys.prefix) / "torch_extensions"
_COMMUNICATION, _DISK = "ShareMemCommBuilder", "AsyncIOBuilder"


def compile_parts(*, on_disk: bool) -> None:
    """Make what a start needs, if it is not there yet; by rank 0, before there are others.

    Args:
        on_disk: weights are to be on a disk.

    Raises:
        EngineStartError: it cannot be made; the message says why.
    """
    set_paths()
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    names = [_COMMUNICATION] if accelerator.device_name() == "cpu" else []
    if on_disk:
        if not _is_disk_possible():
            raise EngineStartError("offload_param: nvme needs libaio with its headers (Debian: libaio-dev)")
        names.append(_DISK)
    with _locked(fcntl.LOCK_EX):
        for stale in _FOLDER.glob("*/lock"):
            stale.unlink()
        for name in names:
            try:
                accelerator.create_op_builder(name).load()
            except (RuntimeError, OSError) as error:
                raise EngineStartError(
                    f"DeepSpeed could not compile a part that it needs, which takes a C++ compiler: {error}"
                ) from error


def set_paths() -> None:
    """Say where parts are to DeepSpeed, which takes them and the tools that make them from the environment."""
    tools = str(Path(sys.executable).parent)
    if os.get_exec_path()[0] != tools:
        os.environ["PATH"] = os.pathsep.join([tools, *os.get_exec_path()])
    os.environ["TORCH_EXTENSIONS_DIR"] = str(_FOLDER)


def loading() -> AbstractContextManager[None]:
    """Within it parts are loaded, by several ranks at once, and nobody compiles."""
    return _locked(fcntl.LOCK_SH)


def _is_disk_possible() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().create_op_builder(_DISK).is_compatible())


@contextmanager
def _locked(how: int) -> Iterator[None]:
    _FOLDER.mkdir(exist_ok=True)
    with (_FOLDER / "localmoe.lock").open("wb") as lock:
        fcntl.flock(lock, how)
        yield


if __name__ == "__main__":
    compile_parts(on_disk=_is_disk_possible())
