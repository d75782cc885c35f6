"""What the engine's process and its client say to each other: MessagePack over one ZeroMQ pair.

Client to engine: first `Launch` (as one line of JSON on standard input, which then stays open as the engine's
lifeline), later `Submit`, `Cancel` and `Inspect` in any number. Engine to client: `Ready` or `StartFailed` once, then
`Outputs` after each step, and one `Inspected` for each `Inspect`.
"""

import msgspec

from localmoe.core.events import EngineState
from localmoe.core.inspection import Inspection
from localmoe.core.request import Request, RequestFailed, TokenChunk
from localmoe.engine.config import EngineConfig


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine process needs to begin."""

    address: str
    """ZeroMQ endpoint that the client has bound."""
    model: str
    """The name it is served under."""
    store_path: str
    config: EngineConfig
    available_memory_bytes: int
    """What the engine may count on when it sizes its cache."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Asks for everything there is to know, between two steps."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded and warm."""


class StartFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot start, and would not if tried again."""

    message: str


class Outputs(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What one step produced."""

    items: list[TokenChunk | RequestFailed]
    state: EngineState


class Inspected(msgspec.Struct, frozen=True, tag=True):
    inspection: Inspection


ToEngine = Submit | Cancel | Inspect
FromEngine = Ready | StartFailed | Outputs | Inspected
