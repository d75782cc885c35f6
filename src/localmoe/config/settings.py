"""The settings of one run. Nothing else in LocalMoE reads the environment.

A setting's value is the first of: what the command line says, its environment variable, the configuration file, the
profile, its default. The environment variable is the name in capitals after `LOCALMOE_`; a component's settings have
two underscores between its name and theirs, as in `LOCALMOE_ENGINE__KV_CACHE_BYTES`. A variable that is set to
nothing counts as not set. The file, YAML or JSON, has the same names in nested blocks.
"""

import difflib
import logging
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from localmoe.config.files import read_config_file
from localmoe.config.profiles import PROFILES, Profile
from localmoe.config.seed_keys import RETIRED_KEYS, TUNING_BLOCKS, take_tuning_blocks
from localmoe.core.errors import ConfigError
from localmoe.engine.config import EngineConfig
from localmoe.gateway.config import GatewayConfig

logger = logging.getLogger(__name__)

ENV_PREFIX = "LOCALMOE_"

_Schema = dict[str, "_Schema | None"]
"""Names that a block may have, each with its own block's where it is one."""


class Settings(BaseSettings):
    """Made by `load_settings`, which turns a bad value into a `ConfigError`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", env_ignore_empty=True, frozen=True
    )

    config: Path | None = None
    """File of settings."""
    profile: Profile = Profile.AUTO
    """Defaults for what is not set."""
    home: Path = Path("~/.localmoe")
    """Directory of models and state; made absolute."""
    host: str = "127.0.0.1"
    """Address that the server listens on. The default is reachable from this machine only."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port that the server listens on; 0 lets the system choose."""
    engine: EngineConfig = EngineConfig()
    gateway: GatewayConfig = GatewayConfig()

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load_settings` has put all of them together


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One source of values."""

    values: Mapping[str, Any]
    origin: Callable[[Sequence[str]], str]
    """Where the setting of this path is set, for messages."""


def load_settings(
    *, config: Path | None = None, profile: Profile | None = None, on_note: Callable[[str], None] = logger.info
) -> Settings:
    """Put together what the command line, the environment, the configuration file and the profile say.

    Args:
        config: the command line's; None: the environment's, if any.
        profile: the command line's; None: the environment's, or the file's, or `auto`.
        on_note: told what became of keys in the file that are not settings any more.

    Raises:
        ConfigError: a value is not allowed, or a key of the file not known; the message has a line for each.
    """
    try:
        environment = EnvSettingsSource(Settings)()
    except SettingsError as error:
        raise ConfigError(f"{error}; a component's variable without a setting's name takes JSON") from error
    flags = {name: value for name, value in (("config", config), ("profile", profile)) if value is not None}
    layers = [
        _Layer(values=flags, origin=lambda path: f"--{path[0]}"),
        _Layer(
            values=environment, origin=lambda path: f"environment variable {ENV_PREFIX}{'__'.join(path).upper()}"
        ),
    ]
    file = config or environment.get("config")
    if file is not None:
        layers += _file_layers(Path(file).expanduser(), on_note)
    name = next((layer.values["profile"] for layer in layers if "profile" in layer.values), Profile.AUTO)
    if name in list(Profile):  # otherwise said below
        layers.append(_Layer(values=PROFILES[Profile(name)], origin=lambda path: f"profile {name}"))
    values: dict[str, Any] = {}
    for layer in reversed(layers):
        values = _merged(values, layer.values)
    try:
        return Settings(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_problem(detail, layers) for detail in error.errors())) from error


def _file_layers(path: Path, on_note: Callable[[str], None]) -> list[_Layer]:
    """A file's own settings, and below them those that its tuning blocks stand for."""
    values = read_config_file(path)
    schema = _schema()
    del schema["config"]
    problems: list[str] = []
    blocks: _Schema = {block: dict.fromkeys(keys) for block, keys in TUNING_BLOCKS.items()}
    values = _checked(values, schema | blocks, problems)
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    try:
        translated, notes = take_tuning_blocks(values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    for note in notes:
        on_note(f"{path}: {note}")
    own = {name: value for name, value in values.items() if name not in TUNING_BLOCKS}
    return [
        _Layer(values=own, origin=lambda _: f"file {path}"),
        _Layer(values=translated, origin=lambda _: f"a tuning block of file {path}"),
    ]


def _schema() -> _Schema:
    """The names of all settings."""
    return {name: _block(field.annotation) for name, field in Settings.model_fields.items()}


def _block(kind: Any) -> _Schema | None:
    """The names of a component's settings; None for what is no component."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return None
    return {field.name: _block(field.type) for field in fields(kind)}


def _checked(values: Mapping[str, Any], schema: _Schema, problems: list[str], *prefix: str) -> dict[str, Any]:
    """Values without the blocks that are empty; a problem for each key that is not in the schema."""
    checked: dict[str, Any] = {}
    for key, value in values.items():
        path = (*prefix, str(key))
        if key not in schema:
            problems.append(_unknown(path, schema))
            continue
        inner = schema[key]
        if inner is None:
            checked[key] = value
        elif isinstance(value, Mapping):
            checked[key] = _checked(value, inner, problems, *path)
        elif value is not None:
            problems.append(f"{'.'.join(path)!r} is {reprlib.repr(value)}; it must be a block of settings")
    return checked


def _unknown(path: Sequence[str], schema: _Schema) -> str:
    *prefix, key = path
    name = ".".join(path)
    if key in RETIRED_KEYS:
        return f"{name!r} is not a setting any more: {RETIRED_KEYS[key]}"
    # In the same block first, then anywhere.
    names = {".".join((*prefix, known)): known for known in schema} | _leaves(_schema())
    near = difflib.get_close_matches(key, names.values(), n=1)
    if near:
        found = next(full for full, known in names.items() if known == near[0])
        return f"{name!r} is not a setting; did you mean {found!r}?"
    return f"{name!r} is not a setting; those of its block are {', '.join(schema)}"


def _leaves(schema: _Schema, *prefix: str) -> dict[str, str]:
    """Full name to last part, of all settings."""
    leaves: dict[str, str] = {}
    for name, inner in schema.items():
        leaves |= {".".join((*prefix, name)): name} if inner is None else _leaves(inner, *prefix, name)
    return leaves


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(under, value) if both else value  # type: ignore[arg-type]
    return merged


def _problem(detail: ErrorDetails, layers: Sequence[_Layer]) -> str:
    """A line about a setting that is not allowed."""
    path = [str(part) for part in detail["loc"]]
    if detail["type"] == "value_error":  # of a component's own check, which begins with the setting's name
        message = str(detail.get("ctx", {}).get("error", detail["msg"]))
        path.append(message.partition(" ")[0])
    else:
        message = f"it is {reprlib.repr(detail['input'])}: {detail['msg'].lower()}"
    origin = next((layer.origin(path) for layer in layers if _has(layer.values, path)), None)
    return f"setting {'.'.join(path)!r}" + (f" ({origin}): " if origin else ": ") + message


def _has(values: object, path: Sequence[str]) -> bool:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True
