"""Who is let in by a server: decided once, and wired together."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from localmoe.cli.terminal import say
from localmoe.config.settings import Settings
from localmoe.core.current import Current
from localmoe.core.errors import ConfigError, StorageError
from localmoe.core.keys import KeyStore
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.config import is_loopback
from localmoe.state.config import STATE_FILE

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from localmoe.gateway.identity.authenticator import Identity
    from localmoe.gateway.limits.limiter import Limiter


def refuse_if_nobody_could_enter(settings: Settings) -> None:
    """Before anything slow happens.

    Raises:
        ConfigError: everybody would be asked who they are, and nobody could answer.
    """
    if _asks_without_keys(settings) and not settings.gateway.identity.tokens.are_taken:
        _asks_before_start(settings)


def with_identity_decided(settings: Settings) -> Settings:
    """Settings that say whether everybody is asked, for those who cannot see what that depends on.

    Raises:
        ConfigError: as `asks_everybody`.
    """
    identity = replace(settings.gateway.identity, mode="required" if _asks_before_start(settings) else "open")
    return settings.model_copy(update={"gateway": replace(settings.gateway, identity=identity)})


def _asks_before_start(settings: Settings) -> bool:
    async def ask() -> bool:
        async with open_keys(settings) as keys:
            return await asks_everybody(settings, keys)

    return asyncio.run(ask())


async def asks_everybody(settings: Settings, keys: KeyStore) -> bool:
    """Whether everybody is asked who they are.

    Raises:
        ConfigError: everybody would be, and nobody could answer.
    """
    if settings.gateway.identity.mode == "open":
        return False
    if settings.gateway.identity.tokens.are_taken:
        return True
    try:
        now_s = time.time()
        has_keys = any(record.is_valid(now_s) for record in await keys.all())
    except StorageError:
        return True  # there may be some, and they can be read later
    if _asks_without_keys(settings) and not has_keys:
        raise ConfigError(
            f"whoever uses the server at {settings.host} has to show a key, and there is none: make one with "
            "`localmoe keys create NAME --role admin`, or set gateway.identity.mode to open, if everybody who can "
            "reach the server may do everything"
        )
    return has_keys


def _asks_without_keys(settings: Settings) -> bool:
    """Whether it asks also where nobody has a key."""
    mode = settings.gateway.identity.mode
    return mode == "required" or (mode != "open" and not is_loopback(settings.host))


def say_who_is_asked(host: str, *, asks: bool) -> None:
    """On the terminal."""
    if asks:
        say("localmoe: whoever uses it has to show an API key or a token")
    elif not is_loopback(host):
        say(f"warning: everyone who can reach {host} can use this server; it asks for no key")


class Doors:
    """What decides about each request, wired together.

    Args:
        settings: of the server.
        gateway: the gateway's, as they are now.
        asks: whether everybody is asked who they are.
    """

    def __init__(self, settings: Settings, gateway: Current[GatewayConfig], keys: KeyStore, *, asks: bool) -> None:
        from localmoe.gateway.middleware.stack import Guard

        config, self._closing = gateway.now, AsyncExitStack()
        self.guard = Guard(
            log=self._log() if config.request_log else None,
            limiter=self._limiter(gateway) if asks else None,
            identity=self._authenticator(config, keys) if asks else _open_to(settings.host, config),
        )

    async def aclose(self) -> None:
        """Write down what has not been yet, and close connections."""
        await self._closing.aclose()

    def _log(self) -> "FilteringBoundLogger":
        from localmoe.cli.request_log import RequestLogWriter

        writer = RequestLogWriter()
        self._closing.push_async_callback(asyncio.to_thread, writer.stop)
        return writer.log

    def _limiter(self, gateway: Current[GatewayConfig]) -> "Limiter":
        from localmoe.gateway.limits.limiter import Limiter

        limiter = Limiter(gateway)
        self._closing.push_async_callback(limiter.aclose)
        return limiter

    def _authenticator(self, config: GatewayConfig, keys: KeyStore) -> "Identity":
        from localmoe.gateway.identity.authenticator import Authenticator
        from localmoe.gateway.identity.jwks import PublicKeys
        from localmoe.gateway.identity.tokens import TokenVerifier

        tokens, public_keys = config.identity.tokens, None
        if tokens.jwks_url is not None:
            public_keys = PublicKeys(tokens.jwks_url)
            self._closing.push_async_callback(public_keys.aclose)
        authenticator = Authenticator(keys, TokenVerifier(tokens, public_keys) if tokens.are_taken else None)
        self._closing.push_async_callback(authenticator.aclose)
        return authenticator


def _open_to(host: str, config: GatewayConfig) -> "Identity":
    """Whom a server at this address lets in that asks nobody."""
    from localmoe.gateway.identity.open import OpenToAll, OpenToOwnPages

    if is_loopback(host) or config.identity.hosts:
        return OpenToOwnPages(hosts=config.identity.hosts, origins=config.cors.origins)
    return OpenToAll()  # by what names others reach it is not known


@asynccontextmanager
async def open_keys(settings: Settings) -> AsyncIterator[KeyStore]:
    """The server's API keys."""
    from localmoe.state.database import Database
    from localmoe.state.keys import SqlKeyStore

    database = Database(settings.state, default_path=settings.home / STATE_FILE)
    try:
        yield SqlKeyStore(database)
    finally:
        await database.close()
