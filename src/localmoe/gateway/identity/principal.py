"""The principal of a request: middleware puts it into the ASGI scope, and routes read it."""

from starlette.requests import Request
from starlette.types import Scope

from localmoe.core.identity import ANYBODY, Principal

_KEY = "localmoe.principal"


def set_principal(scope: Scope, principal: Principal) -> None:
    """Whoever established it says so."""
    scope[_KEY] = principal


def known_principal(scope: Scope) -> Principal | None:
    """Who asks, if that was said already."""
    return scope.get(_KEY)


def principal_of(request: Request) -> Principal:
    """Who asks; anybody where nobody was asked."""
    principal: Principal = request.scope.get(_KEY, ANYBODY)
    return principal
