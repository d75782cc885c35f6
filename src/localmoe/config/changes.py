"""Single settings: how they are named, what differs between two readings, and what the API may change."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from localmoe.backends.remote_config import RemoteConfig
from localmoe.backends.vllm_config import VllmConfig
from localmoe.config.files import refuse_odd_values, shown
from localmoe.config.layers import merge_all, value_at
from localmoe.config.live import OF_THIS_MACHINE, ONLY_IN_FILES, setting_paths
from localmoe.config.schema import checked, unknown
from localmoe.config.secrets import references
from localmoe.config.settings import NOT_IN_FILES, LoadedSettings, Settings, engine_settings, settings_schema
from localmoe.core.configuration import SettingChange
from localmoe.core.errors import ConfigError, SettingNotFoundError
from localmoe.core.serving import ENGINE_KINDS

_FILES_OF_A_MODEL = ("chat_template", "adapters")


def find_setting(key: str) -> tuple[str, ...]:
    """The path of a setting or a block of them. Raises SettingNotFoundError."""
    path = tuple(key.split("."))
    schema = known = settings_schema()
    for depth, part in enumerate(path):
        if not isinstance(known, dict) or part not in known:
            block = known if isinstance(known, dict) else {}
            raise SettingNotFoundError(
                unknown([shown_part[:100] for shown_part in path[: depth + 1]], block, schema)
            )
        known = known[part]
    return path


def leaves_under(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The settings of a block, or the setting itself."""
    return [leaf for leaf in setting_paths() if leaf[: len(path)] == path]


def assignments(path: tuple[str, ...], value: Any) -> dict[tuple[str, ...], Any]:
    """What is to be set, by setting.

    Raises:
        ConfigError: a block is given something else, or names that it does not have; or files may not say it.
    """
    refuse_odd_values(value, ".".join(path))
    if path[0] in NOT_IN_FILES:
        raise ConfigError(f"{path[0]} says which files there are, and is not set in one")
    schema = settings_schema()
    kind = value_at(schema, path)
    if not isinstance(kind, dict):
        return {path: value}
    problems: list[str] = []
    if isinstance(value, Mapping):
        checked(value, kind, schema, problems, *path)
    if problems:
        raise ConfigError("\n".join(problems))
    return dict(_flat(value, kind, path))


def setting_changes(before: LoadedSettings, after: LoadedSettings) -> tuple[SettingChange, ...]:
    """What differs, as it may be shown."""
    was, is_now = before.shown(), after.shown()
    return tuple(
        SettingChange(key=".".join(path), before=value_at(was, path), after=value_at(is_now, path))
        for path in setting_paths()
        if value_at(before.settings, path) != value_at(after.settings, path)
    )


def check_by_api(values: Mapping[tuple[str, ...], Any], now: LoadedSettings) -> None:
    """Refuse what would let a client of the API rule the machine, or read its files and variables: paths, code, and
    references to secrets that are not there already. Raises ConfigError.

    Args:
        values: what is to be set, by setting.
        now: what is set.
    """
    raw = merge_all(now.layers)
    for path, value in values.items():
        _check_allowed(path)
        before = value_at(raw, path)
        if new := references(value, path[-1]) - references(before, path[-1]):
            raise ConfigError(
                f"{shown(min(new)[1])} refers to a secret that {'.'.join(path)} does not have yet; name it in the "
                "configuration file"
            )
        if path == ("models",):
            _check_models(_blocks(value), _blocks(before))


def check_addressees(before: Settings, after: Settings) -> None:
    """Refuse what would have an engine's key sent to somebody else than before, which is how a client of the API
    could read it. Raises ConfigError."""
    if new := _addressees(after) - _addressees(before):
        urls = ", ".join(sorted(url for url, _ in new))
        raise ConfigError(f"an api_key would be sent to {urls}; say so in the configuration file")


def _addressees(settings: Settings) -> set[tuple[str, str]]:
    """(URL, key) of all engines elsewhere that ask for a key, and of those that may be loaded."""
    configs: list[VllmConfig | RemoteConfig] = [settings.vllm]
    for model in settings.models:
        for engine in model.engines:
            config = engine_settings(settings, model, engine)
            if isinstance(config, VllmConfig | RemoteConfig):
                configs.append(config)
    return {(one.url, one.api_key) for one in configs if one.url is not None and one.api_key is not None}


def _check_allowed(path: tuple[str, ...]) -> None:
    for key, reason in ONLY_IN_FILES.items():
        if path[: key.count(".") + 1] == tuple(key.split(".")):
            raise ConfigError(f"{key} is changed in the configuration file only: {reason}")


def _check_models(models: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> None:
    for model in models:
        for name in _FILES_OF_A_MODEL:
            if model.get(name) and all(model[name] != known.get(name) for known in before):
                raise ConfigError(
                    f"{name} of a model is changed in the configuration file only: {OF_THIS_MACHINE}"
                )
    known_engines = [engine for model in before for engine in _blocks(model.get("engines"))]
    for engine in (engine for model in models for engine in _blocks(model.get("engines"))):
        if engine not in known_engines:
            _check_engine(engine)


def _check_engine(engine: Mapping[str, Any]) -> None:
    """What files only may say of engines of all models, they only may say of one's."""
    kind = engine.get("engine", "native")
    if kind not in ENGINE_KINDS:  # what others may take is not known
        raise ConfigError(f"engines of kind {shown(kind)} are set up in the configuration file only")
    settings = engine.get("settings")
    block = "engine" if kind == "native" else kind
    for path in _paths(settings if isinstance(settings, Mapping) else {}, block):
        _check_allowed(path)


def _paths(values: Mapping[Any, Any], *prefix: str) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        path = (*prefix, str(name))
        yield path
        if isinstance(value, Mapping):
            yield from _paths(value, *path)


def _blocks(values: Any) -> list[Mapping[str, Any]]:
    """Those of a list; what else is in it is refused elsewhere."""
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list | tuple) else []


def _flat(values: Any, kind: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Raises ConfigError for a block that has no settings, and would be left out silently."""
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(f"{'.'.join(path)} is a block of settings; give it some, as {{name: value}}")
    for name, value in values.items():
        if isinstance(kind[name], dict):
            yield from _flat(value, kind[name], (*path, name))
        else:
            yield (*path, name), value
