"""Settings of cross-origin requests, which browsers ask about."""

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True)
class CorsConfig:
    """Which pages may use the server from a browser."""

    origins: tuple[str, ...] = ()
    """As `https://chat.example.com`; `*`: all. None: no page but the server's own."""
    credentials: bool = False
    """Whether pages may send cookies and client certificates along; keys they may send anyway."""

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != "*" and not _is_origin(origin):
                raise ValueError(f"origins has {origin!r} in it; it must be like https://chat.example.com, or *")
        if self.credentials and "*" in self.origins:
            raise ValueError("credentials is true for all origins; name those that are trusted in place of *")


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(host) and text == f"{parts.scheme}://{parts.netloc.lower()}"
