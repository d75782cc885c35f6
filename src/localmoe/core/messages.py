"""What a worker's process and its client say to each other: MessagePack over one ZeroMQ pair.

A worker is an engine of ours in a process of its own: the native one, or one that drives somebody else's library in
that library's environment. Client to worker: first its launch (one line of JSON on standard input, which then stays
open as the worker's lifeline), later `Submit`, `Cancel` and `Inspect` in any number. Worker to client: `Ready` or
`StartFailed` once, then `Outputs` after each step, and one `Inspected` for each `Inspect`.
"""

import msgspec

from localmoe.core.events import EngineState
from localmoe.core.inspection import Inspection
from localmoe.core.request import Request, RequestFailed, TokenChunk


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Asks for everything there is to know, between two steps. Only for workers that have an answer."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded and warm."""


class StartFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker cannot start, and would not if tried again."""

    message: str


class Outputs(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What one step produced."""

    items: list[TokenChunk | RequestFailed]
    state: EngineState


class Inspected(msgspec.Struct, frozen=True, tag=True):
    inspection: Inspection


ToWorker = Submit | Cancel | Inspect
FromWorker = Ready | StartFailed | Outputs | Inspected
