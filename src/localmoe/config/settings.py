"""The settings of one run. Nothing else in LocalMoE reads the environment.

A setting's value is the first of: what the command line says, its environment variable, the configuration file, the
profile, its default. The environment variable is the name in capitals after `LOCALMOE_`; a component's settings have
two underscores between its name and theirs, as in `LOCALMOE_ENGINE__KV_CACHE_BYTES`. A variable that is set to
nothing counts as not set; lists and whole blocks are in JSON. The file, YAML or JSON, has the same names in nested
blocks.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from localmoe.config.environment import read_environment
from localmoe.config.files import read_config_file, shown
from localmoe.config.profiles import PROFILES, Profile
from localmoe.config.schema import Schema, block_schema, checked
from localmoe.config.seed_keys import TUNING_BLOCKS, take_tuning_blocks
from localmoe.core.errors import ConfigError
from localmoe.engine.config import EngineConfig
from localmoe.gateway.config import GatewayConfig

logger = logging.getLogger(__name__)


class Settings(BaseModel):
    """Made by `load_settings`, which turns a bad value into a `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

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
        return _expanded(home).absolute()


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
        ConfigError: a value is not allowed, or a name not known; the message has a line for each.
    """
    variables = read_environment(os.environ, _schema())
    flags = {name: value for name, value in (("config", config), ("profile", profile)) if value is not None}
    layers = [_Layer(values=flags, origin=lambda path: f"--{path[0]}")]
    layers += [_Layer(values=values, origin=_always(f"environment variable {name}")) for name, values in variables]
    file = next((layer.values["config"] for layer in layers if "config" in layer.values), None)
    if file is not None:
        layers += _file_layers(_expanded(Path(file)), on_note)
    name = next((layer.values["profile"] for layer in layers if "profile" in layer.values), Profile.AUTO)
    if name in list(Profile):  # otherwise said below
        layers.append(_Layer(values=PROFILES[Profile(name)], origin=_always(f"profile {name}")))
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
    blocks: Schema = {block: dict.fromkeys(keys) for block, keys in TUNING_BLOCKS.items()}
    if "config" in values:
        problems.append("'config' cannot be set in a file; name a file with --config or LOCALMOE_CONFIG")
        del values["config"]
    values = checked(values, schema | blocks, schema, problems)
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
        _Layer(values=own, origin=_always(f"file {path}")),
        _Layer(values=translated, origin=_always(f"a tuning block of file {path}")),
    ]


def _expanded(path: Path) -> Path:
    """With the home directory in place of `~`. Raises ConfigError."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: the home directory is not known here; name one that begins with /") from error


def _always(origin: str) -> Callable[[Sequence[str]], str]:
    return lambda _: origin


def _schema() -> Schema:
    """The names of all settings."""
    return {name: block_schema(field.annotation) for name, field in Settings.model_fields.items()}


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
        said = "it must be a list" if detail["type"] == "tuple_type" else detail["msg"].lower()
        message = f"it is {shown(detail['input'])}: {said}"
    origin = next((layer.origin(path) for layer in layers if _has(layer.values, path)), None)
    return f"setting {'.'.join(path)!r}" + (f" ({origin}): " if origin else ": ") + message


def _has(values: object, path: Sequence[str]) -> bool:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True
