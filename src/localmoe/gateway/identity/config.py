"""Settings of identity."""

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

MIN_SECRET_BYTES = 32
"""As RFC 7518 section 3.2 asks of HS256."""
_MAX_LEEWAY_S = 600.0
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")

RoleName = Literal["viewer", "user", "operator", "admin"]


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """JSON Web Tokens. None is taken where neither `secret` nor `jwks_url` is set."""

    secret: str | None = field(default=None, repr=False)
    """Of tokens that are signed with HS256; of 32 bytes or more."""
    jwks_url: str | None = None
    """Where the issuer publishes its public keys, as OpenID Connect's `jwks_uri` says. https, but for this
    machine."""
    issuer: str | None = None
    """What a token's `iss` must be; needed with `jwks_url`."""
    audience: str | None = None
    """What a token's `aud` must be or have in it; needed with `jwks_url`."""
    leeway_s: float = 30.0
    """How far clocks may be apart."""
    role_claim: str = "role"
    """The claim that says the role, or a list of them, as a path with dots: `realm_access.roles`."""
    roles: dict[str, RoleName] = field(default_factory=dict)
    """Which of the claim's values stand for which role; none: roles are called as here. Of several, the highest
    counts."""

    def __post_init__(self) -> None:
        if self.secret is not None and len(self.secret.encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"secret is shorter than {MIN_SECRET_BYTES} bytes; draw a longer one at random")
        if not 0 <= self.leeway_s <= _MAX_LEEWAY_S:
            raise ValueError(f"leeway_s is {self.leeway_s}; it must be from 0 to {_MAX_LEEWAY_S:g}")
        if not all(self.role_claim.split(".")):
            raise ValueError(f"role_claim is {self.role_claim!r}; it must be names with dots between them")
        if self.jwks_url is None:
            return
        _check_url(self.jwks_url)
        for name in ("issuer", "audience"):
            if not getattr(self, name):
                # Whoever issues tokens for other services, too, would otherwise let their users in here.
                raise ValueError(f"{name} is not set; with jwks_url it must be")

    @property
    def are_taken(self) -> bool:
        """Whether there is anything to verify tokens with."""
        return self.secret is not None or self.jwks_url is not None


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """Who is asked who they are, and how they show it."""

    mode: Literal["auto", "required", "open"] = "auto"
    """`required`: everybody has to show an API key or a token. `open`: nobody, and everybody may do everything.
    `auto`: required where the address is reachable from other machines, or where there are keys or tokens to be
    shown when the server starts."""
    tokens: TokenConfig = TokenConfig()
    hosts: tuple[str, ...] = ()
    """Names that the server is reached by, beside `localhost` and IP addresses. Where nobody is asked and only this
    machine reaches it, or these are set, it does not answer to others: they may be a web page's."""

    def __post_init__(self) -> None:
        for host in self.hosts:
            if _HOST_NAME.fullmatch(host) is None:
                raise ValueError(
                    f"hosts has {host!r} in it; it must be a name like gpu1.example.com, without a port"
                )


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, user, _ = parts.hostname, parts.username, parts.port
    except ValueError as error:
        raise ValueError(f"jwks_url is not a URL: {error}") from None
    if user is not None:
        raise ValueError("jwks_url has a user name in it; keys are published for everybody")
    if not host or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"jwks_url is {url!r}; it must be https:// and a host")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        # Whoever stands in between could let anybody in.
        raise ValueError(f"jwks_url is {url!r}; it must begin with https://")


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
