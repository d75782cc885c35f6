"""Who asks, whether they may, and headers that keep browsers from being clever."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmoe.core.errors import LocalMoEError, PermissionDeniedError
from localmoe.core.identity import Principal
from localmoe.gateway.errors import ApiError, to_api_error
from localmoe.gateway.exchange import current_exchange
from localmoe.gateway.identity.access import OTHER, Rule
from localmoe.gateway.identity.authenticator import Identity
from localmoe.gateway.identity.principal import known_principal

MAX_HEADERS = 100
MAX_HEAD_BYTES = 32 * 2**10
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
_DENIED = 1008
"""A WebSocket's "policy violation"."""


class SecurityMiddleware:
    """Lets a request through if whoever sends it may use its route.

    A principal that is in the scope already was put there by ourselves, for a request in somebody's name: what
    clients send comes without one.
    """

    def __init__(self, app: ASGIApp, *, identity: Identity) -> None:
        self._app = app
        self._identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": _DENIED})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = current_exchange()
        assert exchange is not None, "RequestIdMiddleware must be outside"  # or nobody would be asked

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            if _is_head_too_large(scope):
                await _HEAD_TOO_LARGE.response({"connection": "close"})(scope, receive, send_secured)
                return
            inner = known_principal(scope)
            exchange.is_inner = inner is not None
            if inner is not None:
                exchange.principal = inner
            elif exchange.rule.role is not None:
                exchange.principal = await self._identity.identify(scope["headers"])
            _check(exchange.principal, exchange.rule)
        except LocalMoEError as error:
            await to_api_error(error).response()(scope, receive, send_secured)
            return
        await self._app(scope, receive, send_secured)


_HEAD_TOO_LARGE = ApiError(
    status=431,
    message=f"there are more than {MAX_HEADERS} headers, or more than {MAX_HEAD_BYTES} bytes of path and headers",
    code="headers_too_large",
)


def _is_head_too_large(scope: Scope) -> bool:
    headers = scope["headers"]
    num_bytes = len(scope["path"]) + len(scope.get("query_string", b""))
    num_bytes += sum(len(name) + len(value) for name, value in headers)
    return len(headers) > MAX_HEADERS or num_bytes > MAX_HEAD_BYTES


def _check(principal: Principal, rule: Rule) -> None:
    """Raises PermissionDeniedError."""
    if rule.role is None or principal.role >= rule.role:
        return
    has, needs = principal.role.name.lower(), rule.role.name.lower()
    if rule.route == OTHER:
        raise PermissionDeniedError(f"there is no such route, or it is not for the role {has}")
    raise PermissionDeniedError(f"{rule.method} {rule.route} needs the role {needs}; yours is {has}")
