"""What is known of a request while it is answered, by those who have no part in its route.

It is in a context variable, so that the middleware, the models that can be seen, limits and events of generation find
the same one without every function between them passing it on; tasks that a request starts have it, too.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localmoe.core.bound import Bound
from localmoe.core.events import Event, RequestFinished
from localmoe.core.identity import ANYBODY, STRANGER, Principal
from localmoe.gateway.identity.access import Rule

if TYPE_CHECKING:
    from localmoe.gateway.limits.limiter import Ticket


CLIENT_LEFT = 499


@dataclass(kw_only=True, slots=True)
class Exchange:
    """One request and its answer, as far as they have come."""

    request_id: str
    rule: Rule
    """Of its route."""
    principal: Principal = STRANGER
    is_inner: bool = False
    """Whether it is one of our own, in somebody's name, as those of jobs are."""
    ticket: "Ticket | None" = None
    """Its account with the limits, where there are any."""
    model: str | None = None
    """That answered."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started_s: float = field(default_factory=time.monotonic)
    status: int | None = None
    """Sent so far, or 500 for an answer that broke off."""
    num_bytes: int = 0
    """Of the answer's body, sent so far."""

    @property
    def final_status(self) -> int:
        """499, as nginx has it, where the client left before anything was sent."""
        return CLIENT_LEFT if self.status is None else self.status

    @property
    def duration_s(self) -> float:
        """So far."""
        return time.monotonic() - self.started_s


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def bound(exchange: Exchange) -> Bound[Exchange | None]:
    """Makes it the one that the code inside runs for."""
    return Bound(_current, exchange)


def current_exchange() -> Exchange | None:
    """The one that this code runs for; None: it is no request's."""
    return _current.get()


def current_principal() -> Principal:
    """Who asks; anybody where this is no request's."""
    exchange = _current.get()
    return ANYBODY if exchange is None else exchange.principal


def note_event(event: Event) -> None:
    """Take from an event what it says of the request that it is published in."""
    exchange = _current.get()
    if exchange is not None and isinstance(event, RequestFinished):
        exchange.model = event.model
        exchange.completion_tokens += event.completion_tokens
