"""Everything that the native engine's process needs to begin."""

import msgspec

from localmoe.engine.config import EngineConfig


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on its standard input, as JSON."""

    address: str
    """ZeroMQ endpoint that the client has bound."""
    model: str
    """The name it is served under."""
    store_path: str
    tokenizer_path: str | None
    """Directory of the model's tokenizer, for grammars; None: requests with one are refused."""
    config: EngineConfig
    available_memory_bytes: int
    """What the engine may count on when it sizes its cache."""
