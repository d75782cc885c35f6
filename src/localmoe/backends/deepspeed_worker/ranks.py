"""The processes that compute together: how they meet, what rank 0 tells the others, and that none outlives another.

A rank other than 0 reads steps from its standard input, which is its lifeline too: when rank 0 goes, however it goes,
the pipe closes and the rank exits. Rank 0 waits for each of them on a thread; when one ends, the rest could only wait
for it in vain, so rank 0 says which it was and exits.
"""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO

import msgspec
import torch

from localmoe.backends.deepspeed_worker.frames import read_frame, write_frame
from localmoe.backends.deepspeed_worker.launch import Loaded, RankLaunch, Result, Step
from localmoe.backends.deepspeed_worker.model import Model, Place, load
from localmoe.backends.deepspeed_worker.parts import loading, set_paths
from localmoe.core.errors import EngineStartError

logger = logging.getLogger(__name__)

_SCRATCH = "localmoe-deepspeed-"
_LOCK = "lock"
_NEW_S = 60.0
"""A folder of this age has its lock, if its worker lives."""
_LOOPBACK = "127.0.0.1"


class Others:
    """All ranks but 0, as rank 0 sees them.

    Args:
        told: what rank 0 was told; the others are told the same.
        on_death: called on a thread of its own with what happened; must not return.
    """

    def __init__(self, told: RankLaunch, on_death: Callable[[str], None]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, told.launch.config.num_ranks):
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", "localmoe.backends.deepspeed_worker.follow"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes.append(process)
            threading.Thread(target=_watch, args=(rank, process, on_death), daemon=True).start()
            assert process.stdin is not None
            write_frame(process.stdin, msgspec.structs.replace(told, rank=rank))

    def loaded(self) -> list[Loaded]:
        """Wait until all are."""
        return [read_frame(_output(process), Loaded) for process in self._processes]

    def send(self, steps: Sequence[Step]) -> None:
        """Have each compute its step."""
        for process, step in zip(self._processes, steps, strict=True):
            assert process.stdin is not None
            write_frame(process.stdin, step)

    def results(self) -> list[Result]:
        """Wait for what they computed."""
        return [result for process in self._processes for result in read_frame(_output(process), list[Result])]


def _output(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _watch(rank: int, process: subprocess.Popen[bytes], on_death: Callable[[str], None]) -> None:
    code = process.wait()
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    on_death(f"rank {rank} ended with {how}")


def join(told: RankLaunch) -> tuple[Model, Loaded]:
    """Meet the other ranks and load this one's part of the model.

    Raises:
        EngineStartError: it cannot be served so; the message says why.
    """
    config, rank = told.launch.config, told.rank
    set_paths()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(config.num_ranks),
        # Without it DeepSpeed's all-reduce through shared memory is used all the same, and crashes.
        LOCAL_SIZE=str(config.num_ranks),
        MASTER_ADDR=_LOOPBACK,
        # No port: names DeepSpeed's shared memory.
        MASTER_PORT=str(told.nonce),
        GLOO_SOCKET_IFNAME="lo",
        NCCL_SOCKET_IFNAME="lo",
    )
    num_threads = config.num_threads or max(1, len(os.sched_getaffinity(0)) // config.num_ranks)
    torch.set_num_threads(num_threads)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    on_gpu = get_accelerator().device_name() == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    with loading():
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            # A file, because a TCP store would listen on all of the machine's addresses.
            init_method=f"file://{told.meeting_path}/store",
            rank=rank,
            world_size=config.num_ranks,
            timeout=timedelta(seconds=config.start_timeout_s),
        )
        torch.distributed.barrier()
        # All have it open; with its name gone nothing of it outlives them.
        shared = f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{_LOOPBACK}_{told.nonce}_{rank}"
        Path(shared).unlink(missing_ok=True)
        place = Place(rank=rank, device=device, scratch_path=told.scratch_path)
        return load(told.launch.checkpoint_path, config, place)


class Scratch:
    """A directory of our own for weights on disk. Those of workers that were killed are removed when one is made.

    Args:
        nvme_path: where to make it; None: there is to be none.

    Raises:
        EngineStartError: there can be none there.
    """

    def __init__(self, nvme_path: str | None) -> None:
        self.path: str | None = None
        if nvme_path is None:
            return
        try:
            for old in Path(nvme_path).glob(f"{_SCRATCH}*"):
                _remove_if_left(old)
            self.path = tempfile.mkdtemp(prefix=_SCRATCH, dir=nvme_path)
            self._lock = (Path(self.path) / _LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EngineStartError(f"nvme_path: {error}") from error

    def remove(self) -> None:
        """Give the disk back."""
        if self.path is not None:
            with suppress(OSError):  # what is left is removed by the next one
                _remove(Path(self.path))
            self._lock.close()


def _remove_if_left(folder: Path) -> None:
    try:
        if time.time() - folder.stat().st_mtime > _NEW_S:
            (folder / _LOCK).touch()  # whoever was killed between making one and the other has it no more
        with (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
    except (BlockingIOError, FileNotFoundError):
        logger.info("another worker keeps weights in %s", folder)


def _remove(folder: Path) -> None:
    """The lock last, so that what a killed worker leaves of it is known to be nobody's."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _LOCK:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
