"""Where nobody is asked who they are.

A server that only its own machine reaches needs no keys against other machines, but a browser on it sends requests
for whatever page is open in it. Two headers tell whose doing a request is, and no page can set them:

- `Host`: the name that the browser reaches the server by. A page whose own name was made to lead here (DNS rebinding)
  shows that name. `localhost` and IP addresses lead nobody astray: a page by such a name is the server's own.
- `Origin`: the page's own, with all that it sends but a plain GET, of which it sees nothing. Programs send none, or
  one that is no web page's, such as an application's or a browser extension's.
"""

import ipaddress
import re
from collections.abc import Collection

from localmoe.core.errors import PermissionDeniedError
from localmoe.core.identity import ANYBODY, Principal
from localmoe.gateway.identity.authenticator import RawHeaders

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s:/?#@\[\]\\]+)(:\d*)?")
_MAX_SHOWN_CHARS = 100


class OpenToAll:
    """Asks nobody."""

    async def identify(self, headers: RawHeaders) -> Principal:
        """See `Identity`."""
        return ANYBODY


class OpenToOwnPages:
    """Asks nobody, and lets no web page in that is not the server's own.

    Args:
        hosts: names that the server is reached by, beside `localhost` and IP addresses.
        origins: of pages that may use it nevertheless; `*`: all.
    """

    def __init__(self, *, hosts: Collection[str], origins: Collection[str]) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)

    async def identify(self, headers: RawHeaders) -> Principal:
        """See `Identity`."""
        hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1").lower() for name, value in headers if name == b"origin"]
        for host in hosts:
            if not self._is_ours(host):
                raise PermissionDeniedError(
                    f"the server does not know itself by the Host {host[:_MAX_SHOWN_CHARS]!r}; if that is its name, "
                    "put it into gateway.identity.hosts, or make keys and set gateway.identity.mode to required"
                )
        for origin in origins:
            if _is_page(origin) and not self._may(origin, hosts):
                raise PermissionDeniedError(
                    f"pages of {origin[:_MAX_SHOWN_CHARS]!r} may not use the server; if they are to, name that in "
                    "gateway.cors.origins"
                )
        return ANYBODY

    def _is_ours(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found["name"].removesuffix(".")
        return name == "localhost" or name.endswith(".localhost") or name in self._hosts or _is_address(name)

    def _may(self, origin: str, hosts: Collection[str]) -> bool:
        return bool(self._origins & {"*", origin}) or origin.partition("://")[2] in hosts


def _is_page(origin: str) -> bool:
    """`null` is what pages in a sandbox, and those from files, have."""
    return origin == "null" or origin.startswith(("http://", "https://"))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
