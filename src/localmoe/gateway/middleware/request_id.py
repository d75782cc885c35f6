"""Names each request, and keeps note of what is answered."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmoe.gateway.exchange import Exchange, bound
from localmoe.gateway.identity.access import AccessTable

_MAX_REQUEST_ID_CHARS = 128


class RequestIdMiddleware:
    """Gives every answer an `x-request-id`, the client's own if it is sane, and makes the request's `Exchange`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._access = AccessTable()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _sane_request_id(Headers(scope=scope).get("x-request-id")) or uuid.uuid4().hex
        exchange = Exchange(request_id=request_id, rule=self._access.rule(scope["method"], scope["path"]))

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                exchange.num_bytes += len(message.get("body", b""))
            await send(message)

        with bound(exchange):
            await self._app(scope, receive, send_noted)


def _sane_request_id(value: str | None) -> str | None:
    if value and len(value) <= _MAX_REQUEST_ID_CHARS and all("!" <= char <= "~" for char in value):
        return value
    return None
