"""Rank 0: `python -m localmoe.backends.deepspeed_worker`. It talks with the client, decides, and computes its part.

One thread does everything in turn: take what the client sent, step, send what came out. While there is nothing to
compute it sleeps in `poll`. A second thread only waits for standard input to close, which happens when the parent
goes, however it goes, and then ends the process at once.
"""

import gc
import logging
import os
import signal
import sys
import tempfile
import threading
from typing import TYPE_CHECKING

import msgspec
import zmq

from localmoe.backends.deepspeed_worker.batch import Batch, Room
from localmoe.backends.deepspeed_worker.follow import take_stdout
from localmoe.backends.deepspeed_worker.launch import Launch, RankLaunch, Result, Step
from localmoe.core.errors import LocalMoEError, OverloadedError
from localmoe.core.messages import Cancel, FromWorker, Outputs, Ready, StartFailed, Submit, ToWorker
from localmoe.core.request import Request, RequestFailed, TokenChunk

if TYPE_CHECKING:
    from localmoe.backends.deepspeed_worker.model import Model
    from localmoe.backends.deepspeed_worker.ranks import Scratch

logger = logging.getLogger(__name__)


class Engine:
    """All ranks together: requests in, chunks out.

    Args:
        launch: of the worker.
        scratch: made already.
        end: ends the process, and says why.
    """

    def __init__(self, launch: Launch, scratch: "Scratch", end: "EndProcess") -> None:
        from localmoe.backends.deepspeed_worker.attention import PAGE_TOKENS
        from localmoe.backends.deepspeed_worker.parts import compile_parts
        from localmoe.backends.deepspeed_worker.ranks import Others, join

        config = launch.config
        compile_parts(on_disk=config.offload_param == "nvme")
        with tempfile.TemporaryDirectory(prefix="localmoe-ranks-") as meeting_path:
            told = RankLaunch(
                launch=launch, rank=0, meeting_path=meeting_path, nonce=os.getpid(), scratch_path=scratch.path
            )
            self._others: Others = Others(told, end)
            self._model: Model
            self._model, loaded = join(told)
            all_loaded = [loaded, *self._others.loaded()]
        self._splits = config.mode == "zero3"
        self._num_ranks = config.num_ranks
        room = Room(
            num_ranks=config.num_ranks if self._splits else 1,
            num_pages=min(each.num_pages for each in all_loaded),
            page_tokens=PAGE_TOKENS,
            vocab_size=loaded.vocab_size,
            max_context_tokens=loaded.max_context_tokens,
        )
        self.batch = Batch(launch.model, config, room)

    def step(self) -> list[TokenChunk | RequestFailed]:
        """Bring the scheduled sequences one step forward."""
        steps = self.batch.schedule()
        try:
            results = self._compute(steps)
        except Exception as error:
            if self._num_ranks > 1:
                raise  # the others are in the middle of an exchange with us, and cannot be called back
            # Whatever went wrong (memory, most likely), it must cost this step's requests only.
            logger.exception("a step failed")
            self._model.ensure_device()  # but a GPU that is lost costs the process, which is replaced
            return self.batch.fail(steps, f"the engine failed: {error}")
        return self.batch.update(results)

    def _compute(self, steps: list[Step]) -> list[Result]:
        # Ranks that share layers all compute the same.
        self._others.send(steps[1:] if self._splits else steps * (self._num_ranks - 1))
        results = self._model.step(steps[0])
        return [*results, *self._others.results()]


class EndProcess:
    """Ends this process at once, from whichever thread."""

    def __init__(self) -> None:
        self.scratch: Scratch | None = None
        self._lock = threading.Lock()

    def __call__(self, reason: str | None) -> None:
        self._lock.acquire()  # never given back: the first reason counts
        if reason is not None:
            logger.error("%s; the engine ends", reason)
        if self.scratch is not None:
            self.scratch.remove()
        os._exit(0 if reason is None else 1)


def serve(engine: Engine, socket: "zmq.Socket[bytes]") -> None:
    """Serve until the process ends. Every step is reported, also one that gives nothing to see: silence is how the
    client knows a hung engine."""
    decoder = msgspec.msgpack.Decoder(ToWorker)
    encoder = msgspec.msgpack.Encoder()
    batch = engine.batch
    while True:
        items: list[TokenChunk | RequestFailed] = []
        if not batch.has_work:
            socket.poll()
        while socket.poll(0):
            message = decoder.decode(socket.recv())
            if isinstance(message, Cancel):
                batch.cancel(message.request_id)
            elif isinstance(message, Submit):
                items += _add(batch, message.request)
        items += engine.step()
        socket.send(encoder.encode(Outputs(items=items, state=batch.state())))


def _add(batch: Batch, request: Request) -> list[RequestFailed]:
    try:
        batch.add(request)
    except LocalMoEError as error:
        overloaded = isinstance(error, OverloadedError)
        return [RequestFailed(request_id=request.id, message=str(error), overloaded=overloaded)]
    return []


def main() -> None:
    # Ctrl-C in a terminal reaches us too, as what ends a control group does. The client decides: it drains first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    take_stdout()
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    end = EndProcess()
    lifeline = threading.Thread(target=_end_with_parent, args=(end,), daemon=True)
    lifeline.start()
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PAIR)
    # Unbounded here, because what is unsent is bounded by the requests admitted and their max_tokens.
    socket.set_hwm(0)
    socket.connect(launch.address)

    def say(message: FromWorker) -> None:
        socket.send(msgspec.msgpack.encode(message))

    try:
        from localmoe.backends.deepspeed_worker.ranks import Scratch

        end.scratch = Scratch(launch.config.nvme_path)
        engine = Engine(launch, end.scratch, end)
    except Exception as error:
        if not isinstance(error, LocalMoEError):
            logger.exception("the engine cannot start")
        say(StartFailed(message=str(error) or type(error).__name__))
        lifeline.join()  # the client ends us once it has read why
    # What has been loaded stays, so the collector need not look at it again and again.
    gc.freeze()
    say(Ready())
    try:
        serve(engine, socket)
    except Exception as error:
        logger.exception("a step failed in one of %d ranks", launch.config.num_ranks)
        end(f"rank 0 failed: {error}")


def _end_with_parent(end: EndProcess) -> None:
    while sys.stdin.buffer.read(4096):
        continue
    end(None)


if __name__ == "__main__":
    main()
