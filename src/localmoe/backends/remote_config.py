"""Settings of a server elsewhere."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

_MAX_TIME_S = 1_000_000
"""Clocks take no infinite times."""


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """A server that speaks OpenAI's API."""

    url: str
    """Where its API begins, such as `https://api.example.com/v1`."""
    model: str
    """What it calls the model."""
    api_key: str | None = field(default=None, repr=False)
    capacity: int = 64
    """Requests that it gets at once; more wait here."""
    connect_timeout_s: float = 10.0
    """For a connection, and for an answer to the question whether it is there."""
    start_timeout_s: float = 30.0
    """A server that has not answered by then cannot be used."""
    health_interval_s: float = 5.0
    """Between two looks whether it is still there."""

    def __post_init__(self) -> None:
        for name in ("capacity", "connect_timeout_s", "start_timeout_s", "health_interval_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
            if name.endswith("_s") and value > _MAX_TIME_S:
                raise ValueError(f"{name} is {value}; it must be at most {_MAX_TIME_S}")
        _check_url(self.url)
        if not self.model:
            raise ValueError("model is empty; it must be the server's name of the model")
        # It is sent in a header. The message must not show it.
        if self.api_key is not None and not all("!" <= char <= "~" for char in self.api_key or " "):
            raise ValueError(
                "api_key is empty, or has characters that no key has, such as a space or a line's end"
            )


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, user, _ = parts.hostname, parts.username, parts.port
    except ValueError as error:
        raise ValueError(f"url is not one: {error}") from None
    if user is not None:
        raise ValueError("url has a user name in it; a server's key belongs in api_key")
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable():
        raise ValueError(f"url is {url!r}; it must begin with http:// or https:// and a host")
    if parts.query or parts.fragment or not parts.path.rstrip("/").endswith("/v1"):
        raise ValueError(f"url is {url!r}; it must end with /v1, where the API begins")
