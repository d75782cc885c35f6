"""The native engine as a process of its own: `python -m localmoe.engine.process`.

One thread does everything in turn: take what the client sent, step, send what came out. While there is nothing to
compute it sleeps in `poll`. A second thread only waits for standard input to close, which happens when the parent
goes, however it goes, and then ends the process at once: an engine never outlives its gateway.
"""

import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from localmoe.core.errors import LocalMoEError, OverloadedError
from localmoe.core.imports import lasting_imports
from localmoe.core.messages import (
    Cancel,
    FromWorker,
    Inspect,
    Inspected,
    Outputs,
    Ready,
    StartFailed,
    ToWorker,
)
from localmoe.core.request import RequestFailed, TokenChunk
from localmoe.engine.launch import Launch
from localmoe.hardware.memory import available_memory_bytes, process_memory_bytes

if TYPE_CHECKING:
    from localmoe.engine.engine import Engine

logger = logging.getLogger(__name__)

_MEMORY_INTERVAL_S = 1.0
"""Between two looks at how much is left, while there is something to do."""


def serve(engine: "Engine", socket: "zmq.Socket[bytes]") -> None:
    """Serve until the process ends. Every step is reported, also one that gives nothing to see: silence is how the
    client knows a hung engine."""
    decoder = msgspec.msgpack.Decoder(ToWorker)
    encoder = msgspec.msgpack.Encoder()
    looked_s = 0.0
    while True:
        items: list[TokenChunk | RequestFailed] = []
        if not engine.has_work:
            engine.rest()
            socket.poll()
        while socket.poll(0):
            message = decoder.decode(socket.recv())
            if isinstance(message, Cancel):
                engine.cancel(message.request_id)
                continue
            if isinstance(message, Inspect):
                socket.send(encoder.encode(Inspected(engine.inspect())))
                continue
            try:
                engine.add(message.request)
            except LocalMoEError as error:
                overloaded = isinstance(error, OverloadedError)
                failed = RequestFailed(request_id=message.request.id, message=str(error), overloaded=overloaded)
                items.append(failed)
        if time.monotonic() - looked_s > _MEMORY_INTERVAL_S:
            looked_s = time.monotonic()
            engine.relieve(available_memory_bytes())
        items += engine.step()
        socket.send(encoder.encode(Outputs(items=items, state=engine.state())))


def main() -> None:
    # Ctrl-C in a terminal reaches us too, as what ends a control group does. The client decides: it drains first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    lifeline = threading.Thread(target=_exit_with_parent, daemon=True)
    lifeline.start()
    # OpenMP threads spin between two products unless told before torch is loaded. On cores shared with the gateway
    # (or anything else) a spinning thread keeps the one it waits for from running.
    os.putenv("OMP_WAIT_POLICY", "PASSIVE")
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PAIR)
    # Unbounded here, because what is unsent is bounded by the requests admitted and their max_tokens.
    socket.set_hwm(0)
    socket.connect(launch.address)

    def say(message: FromWorker) -> None:
        socket.send(msgspec.msgpack.encode(message))

    try:
        with lasting_imports():
            from localmoe.engine.load import load_engine, warm_up

        # What the libraries took is gone, too: it was there when the client looked.
        available_bytes = launch.available_memory_bytes - process_memory_bytes()
        engine = load_engine(launch.model, Path(launch.store_path), launch.config, available_bytes)
        warm_up(engine)
        if launch.config.routing_trace is not None:
            engine.record_routing(Path(launch.config.routing_trace))
        engine.take_grammars(None if launch.tokenizer_path is None else Path(launch.tokenizer_path))
    except Exception as error:
        # Whatever it was, the client hears why. What nobody foresaw, as weights that kernels refuse, is traced too.
        if not isinstance(error, LocalMoEError):
            logger.exception("the engine could not start")
        say(StartFailed(message=str(error) or type(error).__name__))
        lifeline.join()  # the client ends us once it has read why
    # What has been loaded stays for good, so the garbage collector need not look at it.
    gc.freeze()
    say(Ready())
    serve(engine, socket)


def _exit_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        continue
    os._exit(0)


if __name__ == "__main__":
    main()
