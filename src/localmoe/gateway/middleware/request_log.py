"""One line for each request, without anything that somebody wrote or keeps secret."""

from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from localmoe.gateway.exchange import Exchange, current_exchange
from localmoe.gateway.identity.access import OTHER

_MAX_PATH_CHARS = 200


class RequestLogMiddleware:
    """Logs each request when it has been answered."""

    def __init__(self, app: ASGIApp, *, log: FilteringBoundLogger) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = current_exchange()
        try:
            await self._app(scope, receive, send)
        finally:
            if exchange is not None:
                self._log.info("request", **_fields(scope, exchange))


def _fields(scope: Scope, exchange: Exchange) -> dict[str, Any]:
    fields = {
        "id": exchange.request_id,
        "principal": exchange.principal.id,
        "client": scope["client"][0] if scope.get("client") else None,
        "method": exchange.rule.method,
        "route": exchange.rule.route,
        "status": exchange.final_status,
        "duration_ms": round(exchange.duration_s * 1000, 1),
        "bytes": exchange.num_bytes,
    }
    if exchange.rule.route == OTHER:
        fields["path"] = scope["path"][:_MAX_PATH_CHARS]
    if exchange.model is not None:
        fields |= {
            "model": exchange.model,
            "prompt_tokens": exchange.prompt_tokens,
            "completion_tokens": exchange.completion_tokens,
        }
    return fields
