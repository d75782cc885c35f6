"""A rank other than 0: `python -m localmoe.backends.deepspeed_worker.follow`. See `ranks.py`."""

import logging
import os
import queue
import signal
import sys
import threading
import time
from typing import IO

from localmoe.backends.deepspeed_worker.frames import read_frame, write_frame
from localmoe.backends.deepspeed_worker.launch import RankLaunch, Step
from localmoe.core.errors import LocalMoEError

logger = logging.getLogger(__name__)

_SAY_GRACE_S = 5.0
"""What one rank refuses, all do: rank 0 gets this long to say so before the end of another ends it."""


def main() -> None:
    # What interrupts a terminal's or a control group's processes is for the client to decide on.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    answers = take_stdout()
    told = read_frame(sys.stdin.buffer, RankLaunch)
    steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
    threading.Thread(target=_read_steps, args=(steps,), daemon=True).start()
    from localmoe.backends.deepspeed_worker.ranks import join

    try:
        model, loaded = join(told)
    except LocalMoEError as error:
        logger.error("rank %d cannot start: %s", told.rank, error)
        time.sleep(_SAY_GRACE_S)
        sys.exit(1)
    write_frame(answers, loaded)
    while True:
        write_frame(answers, model.step(steps.get()))


def take_stdout() -> IO[bytes]:
    """Standard output for us alone; what libraries print goes to standard error."""
    ours = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return ours


def _read_steps(steps: "queue.SimpleQueue[Step]") -> None:
    """On a thread of its own, so that the pipe's end is seen while the rank computes, or waits for another."""
    try:
        while True:
            steps.put(read_frame(sys.stdin.buffer, Step))
    except EOFError:
        os._exit(0)


if __name__ == "__main__":
    main()
