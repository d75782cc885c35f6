"""The principal of a request of our own, in somebody's name, as those of jobs are: it is in the ASGI scope, where no
client can put anything."""

from starlette.types import Scope

from localmoe.core.identity import Principal

_KEY = "localmoe.principal"


def set_principal(scope: Scope, principal: Principal) -> None:
    """Says whose request of our own this is; nobody is asked."""
    scope[_KEY] = principal


def known_principal(scope: Scope) -> Principal | None:
    """Whose it is, if it is one of our own."""
    return scope.get(_KEY)
