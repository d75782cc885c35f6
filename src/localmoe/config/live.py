"""When a changed setting takes effect, and who is told of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

from localmoe.config.layers import value_at
from localmoe.config.schema import leaves
from localmoe.config.settings import Settings, settings_schema
from localmoe.core.configuration import Effect
from localmoe.core.errors import ConfigError

T = TypeVar("T")
_T_contra = TypeVar("_T_contra", contravariant=True)

_REPLACED = "models with such an engine are replaced, one after the other; others serve on"
_LISTENING = "the address is bound once"
OF_THIS_MACHINE = "it names files of this machine"

EFFECTS: Mapping[str, tuple[Effect, str]] = {
    "config": ("restart", "it says which files are read"),
    "env": ("restart", "likewise"),
    "profile": ("live", "by what it sets"),
    "home": ("restart", "models and state are in it"),
    "host": ("restart", _LISTENING),
    "port": ("restart", _LISTENING),
    "api_key": ("restart", "commands use it, not the server"),
    "models": (
        "models",
        "those that are new are loaded, changed ones are replaced, those that are gone are unloaded",
    ),
    "engine": ("models", _REPLACED),
    "vllm": ("models", _REPLACED),
    "deepspeed": ("models", _REPLACED),
    "other_engines": ("models", _REPLACED),
    "dispatch": ("live", "for requests from then on"),
    "gateway.max_body_bytes": ("live", ""),
    "gateway.keepalive_s": ("live", "for streams from then on"),
    "gateway.max_choices": ("live", ""),
    "gateway.max_logprobs": ("live", ""),
    "gateway.body_timeout_s": ("live", ""),
    "gateway.max_background_responses": ("live", ""),
    "gateway.background_timeout_s": ("live", "for responses from then on"),
    "gateway.identity": ("restart", "API keys themselves are made and revoked at any time, with `localmoe keys`"),
    "gateway.limits": ("live", "what was counted stays counted"),
    "gateway.limits.redis_url": ("restart", "counts are there"),
    "gateway.cors": ("restart", ""),
    "gateway.jobs": ("restart", ""),
    "gateway.cache": ("restart", ""),
    "gateway.request_log": ("restart", ""),
    "state": ("restart", "the database is opened once"),
    "ray": ("restart", "a cluster's gateways are started with their settings"),
    "configuration.watch": ("restart", ""),
    "configuration.poll_interval_s": ("restart", ""),
    "configuration.max_versions": ("live", "with the next version"),
}
"""By setting, or block of settings: when a change takes effect, and what there is to know."""

ONLY_IN_FILES: Mapping[str, str] = {
    "home": OF_THIS_MACHINE,
    "state.database_url": OF_THIS_MACHINE,
    "state.files_directory": OF_THIS_MACHINE,
    "ray": "it says whose machines compute",
    "other_engines": "they are for packages that may take anything",
    "engine.routing_trace": OF_THIS_MACHINE,
    "engine.tiers.stripes": OF_THIS_MACHINE,
    "deepspeed.nvme_path": OF_THIS_MACHINE,
    "vllm.trust_remote_code": "it runs code that comes with a checkpoint",
}
"""Settings that the API does not change, and why: whoever may change them rules the machine, not only the server."""


def effect(path: Sequence[str]) -> Effect:
    """When a change of a setting takes effect; what the table does not have is taken up by a restart."""
    keys = (".".join(path[:depth]) for depth in range(len(path), 0, -1))
    return next((EFFECTS[key][0] for key in keys if key in EFFECTS), "restart")


def setting_paths() -> list[tuple[str, ...]]:
    """The paths of all settings."""
    return leaves(settings_schema())


def changed_paths(before: Settings, after: Settings) -> list[tuple[str, ...]]:
    """Settings that differ."""
    return [path for path in setting_paths() if value_at(before, path) != value_at(after, path)]


def running_settings(running: Settings, wanted: Settings) -> Settings:
    """What can be had without a restart: all that is wanted, but what only a restart changes as it is.

    Raises:
        ConfigError: the one cannot be without the other.
    """
    values = {name: _attainable(getattr(running, name), getattr(wanted, name), name) for name in _names(wanted)}
    return wanted.model_copy(update=values)


def _attainable(running: Any, wanted: Any, *path: str) -> Any:
    """The same of one setting, or of a block."""
    if running == wanted:
        return wanted
    if not is_dataclass(running) or not is_dataclass(wanted):
        return running if effect(path) == "restart" else wanted
    values = {
        name: _attainable(getattr(running, name), getattr(wanted, name), *path, name) for name in _names(wanted)
    }
    try:
        # All at once: settings of a block may need each other.
        return replace(wanted, **values)  # type: ignore[type-var]
    except ValueError as error:
        raise ConfigError(
            f"some settings of {'.'.join(path)} take a restart to change, and without it the rest cannot be: {error}"
        ) from None


def _names(block: Any) -> list[str]:
    return list(Settings.model_fields) if isinstance(block, Settings) else [one.name for one in fields(block)]


def restart_paths(running: Settings, wanted: Settings) -> tuple[str, ...]:
    """Settings that differ, and need a restart."""
    return tuple(".".join(path) for path in changed_paths(running, wanted) if effect(path) == "restart")


class Applied(Protocol[_T_contra]):
    """What takes a component's new settings: at once, or not at all by an exception."""

    def __call__(self, settings: _T_contra, /) -> None:
        """Take them."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Subscription:
    select: Callable[[Settings], Any]
    apply: Applied[Any]


class Subscriptions:
    """Components that want to know when their settings are others."""

    def __init__(self) -> None:
        self._subscriptions: list[_Subscription] = []

    def subscribe(self, select: Callable[[Settings], T], apply: Applied[T]) -> None:
        """Have something called with its settings whenever they change.

        Args:
            select: which settings.
            apply: takes them.
        """
        self._subscriptions.append(_Subscription(select=select, apply=apply))

    def announce(self, before: Settings, after: Settings) -> None:
        """Tell all whom it concerns. If one cannot take its settings, all keep those that they had, and its exception
        is raised."""
        told = []
        try:
            for subscription in self._subscriptions:
                if subscription.select(before) != subscription.select(after):
                    told.append(subscription)
                    subscription.apply(subscription.select(after))
        except Exception:
            for subscription in reversed(told):
                subscription.apply(subscription.select(before))
            raise
