"""The native engine as a process of its own: `python -m localmoe.engine.process`.

One thread does everything in turn: take what the client sent, step, send what came out. While there is nothing to
compute it sleeps in `poll`. A second thread only waits for standard input to close, which happens when the parent
goes, however it goes, and then ends the process at once: an engine never outlives its gateway.
"""

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
from localmoe.core.request import RequestFailed
from localmoe.engine.messages import Cancel, FromEngine, Launch, Outputs, Ready, StartFailed, ToEngine

if TYPE_CHECKING:
    from localmoe.engine.engine import Engine

logger = logging.getLogger(__name__)


def serve(engine: "Engine", socket: "zmq.Socket[bytes]") -> None:
    """Serve until the process ends."""
    decoder = msgspec.msgpack.Decoder(ToEngine)
    encoder = msgspec.msgpack.Encoder()
    while True:
        refused: list[RequestFailed] = []
        changed = False
        while socket.poll(0 if engine.scheduler.has_work or changed else None):
            message = decoder.decode(socket.recv())
            changed = True
            if isinstance(message, Cancel):
                engine.scheduler.cancel(message.request_id)
                continue
            try:
                engine.scheduler.add(message.request)
            except OverloadedError as error:
                refused.append(RequestFailed(request_id=message.request.id, message=str(error), overloaded=True))
        items = [*refused, *engine.step()]
        if items or changed:
            socket.send(encoder.encode(Outputs(items=items, state=engine.state())))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches us too; the client decides.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # OpenMP threads spin between two products unless told before torch is loaded. On cores shared with the gateway
    # (or anything else) a spinning thread keeps the one it waits for from running.
    os.putenv("OMP_WAIT_POLICY", "PASSIVE")
    from localmoe.engine.load import load_engine, warm_up

    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PAIR)
    # Unbounded here, because what is unsent is bounded by the requests admitted and their max_tokens.
    socket.set_hwm(0)
    socket.connect(launch.address)

    def say(message: FromEngine) -> None:
        socket.send(msgspec.msgpack.encode(message))

    started = time.monotonic()
    try:
        engine = load_engine(launch.model, Path(launch.store_path), launch.config, launch.available_memory_bytes)
        warm_up(engine)
    except (LocalMoEError, MemoryError) as error:
        say(StartFailed(message=str(error) or type(error).__name__))
        socket.close(linger=5000)
        sys.exit(1)
    say(Ready(load_s=time.monotonic() - started))
    serve(engine, socket)


def _exit_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        continue
    os._exit(0)


if __name__ == "__main__":
    main()
