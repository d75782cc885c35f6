"""uvicorn's HTTP, with bounds on what a client may send before there is a request to look at.

httptools collects a request line, headers, chunk extensions and trailers of any size, and uvicorn waits for them for
ever. Here a connection is closed that sends too much, or takes too long, between two things that can be used: pieces
of a body and ends of requests. A head that is whole and merely large is the security middleware's business.

Nor does anybody who does not read keep what is being answered, and the engine behind it, waiting for ever: the kernel
gives such a connection up.
"""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_PENDING_BYTES = 64 * 2**10
_MAX_WAIT_S = 30.0
_MAX_STALL_S = 60.0
"""How long a client may take nothing of what was sent."""
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    # With these in it, the instance's dictionary would be too large to share its keys, and every connection 1.5 KB.
    __slots__ = ("_is_in_head", "_num_pending_bytes", "_timer")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_pending_bytes = 0
        self._is_in_head = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(_MAX_STALL_S * 1000))
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_pending_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._num_pending_bytes > _MAX_PENDING_BYTES:
            if not self._is_answering():
                self.transport.write(_TOO_LARGE)
            self.transport.close()
        elif self._timer is None and (self._is_in_head or not self._is_answering()):
            self._start_timer()

    def on_message_begin(self) -> None:
        self._is_in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # or it is a trailer: nobody in front of us has looked at those
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_pending_bytes = 0
        super().on_message_complete()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(_MAX_WAIT_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
