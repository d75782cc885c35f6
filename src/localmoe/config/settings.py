"""The settings of one run. Nothing else in LocalMoE reads the environment.

A setting's value is the first of: what the command line says, its environment variable, the overlay of the
configuration file, the file, the profile, its default. The environment variable is the name in capitals after
`LOCALMOE_`; a component's settings have two underscores between its name and theirs, as in
`LOCALMOE_ENGINE__KV_CACHE_BYTES`. A variable that is set to nothing counts as not set; lists and whole blocks are in
JSON. The file, YAML or JSON, has the same names in nested blocks; its overlay for an environment called `production`
is `site.production.yaml` beside `site.yaml`.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic_core import ErrorDetails

from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.ray_config import RayConfig
from localmoe.backends.remote_config import RemoteConfig
from localmoe.backends.vllm_config import VllmConfig
from localmoe.config.environment import read_environment
from localmoe.config.files import parse_config, read_config_bytes, shown
from localmoe.config.layers import DEFAULT, Layer, has, merge_all, merged, nested, setter
from localmoe.config.management import ManagementConfig
from localmoe.config.migration import migrate
from localmoe.config.profiles import PROFILES, Profile
from localmoe.config.schema import Schema, block_schema, checked
from localmoe.config.secrets import is_secret, masked, plain_secrets, resolved, without_secrets
from localmoe.config.seed_keys import TUNING_BLOCKS
from localmoe.core.errors import ConfigError
from localmoe.core.serving import EngineSpec, ModelSpec
from localmoe.dispatch.config import DispatchConfig
from localmoe.engine.config import EngineConfig
from localmoe.gateway.config import GatewayConfig
from localmoe.state.config import StateConfig

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")

NOT_IN_FILES = ("config", "env")
"""Settings that say which files there are."""
_ENV = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Settings(BaseModel):
    """Made by `load_settings`, which turns a bad value into a `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    config: Path | None = None
    """File of settings."""
    env: str | None = None
    """Where this runs, such as `production`: `site.production.yaml` is then laid over `site.yaml`."""
    profile: Profile = Profile.AUTO
    """Defaults for what is not set."""
    home: Path = Path("~/.localmoe")
    """Directory of models and state; made absolute."""
    host: str = "127.0.0.1"
    """Address that the server listens on. The default is reachable from this machine only."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port that the server listens on; 0 lets the system choose."""
    api_key: str | None = Field(default=None, repr=False)
    """What `localmoe chat` and `localmoe inspect` show a server that asks who they are."""
    engine: EngineConfig = EngineConfig()
    """Native engines, where a model says nothing else."""
    vllm: VllmConfig = VllmConfig()
    """Likewise vLLM."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Likewise DeepSpeed."""
    other_engines: dict[str, dict[str, Any]] = {}
    """Likewise engines that installed packages add, by kind."""
    dispatch: DispatchConfig = DispatchConfig()
    """How requests are shared out among the engines of a model."""
    gateway: GatewayConfig = GatewayConfig()
    """The HTTP service."""
    state: StateConfig = StateConfig()
    """Where keys, jobs, files and stored responses are kept."""
    ray: RayConfig = RayConfig()
    """The cluster of `localmoe serve --ray`."""
    models: tuple[ModelSpec, ...] = ()
    """What `localmoe serve` serves when it is told no model; none: the demo model."""
    configuration: ManagementConfig = ManagementConfig()
    """The configuration itself."""

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return _expanded(home).absolute()


@dataclass(frozen=True, kw_only=True)
class ConfigSource:
    """What one run was told of its settings, to be read more than once."""

    config: Path | None = None
    """The command line's; None: the environment's, if any."""
    env: str | None = None
    """Likewise."""
    profile: Profile | None = None
    """The command line's; None: the environment's, or the file's, or `auto`."""
    flags: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    """What else the command line says, by setting."""

    def layers(self) -> list[Layer]:
        """The command line's."""
        named = {("config",): self.config, ("env",): self.env, ("profile",): self.profile, **self.flags}
        return [
            Layer(values=nested(path, value), origin=f"--{path[-1].replace('_', '-')}")
            for path, value in named.items()
            if value is not None
        ]


@dataclass(frozen=True, kw_only=True)
class LoadedSettings:
    """Settings, and where they are from."""

    source: ConfigSource = field(repr=False)
    settings: Settings = field(repr=False)
    layers: Sequence[Layer] = field(repr=False)
    """The uppermost first."""
    files: Mapping[Path, bytes] = field(repr=False)
    """What they were read from, byte for byte; the overlay first, where there is one."""
    notes: Sequence[str]
    """What became of keys in the files that are not settings any more."""

    def origin(self, path: Sequence[str]) -> str:
        """Where a setting is set."""
        layer = setter(path, self.layers)
        return DEFAULT if layer is None else layer.origin

    def shown(self) -> dict[str, Any]:
        """All values, secrets masked, as JSON has them."""
        values = masked(self.settings.model_dump(mode="json"), merge_all(self.layers))
        assert isinstance(values, dict)
        return values


def load_settings(
    *,
    config: Path | None = None,
    profile: Profile | None = None,
    env: str | None = None,
    on_note: Callable[[str], None] = logger.info,
) -> Settings:
    """Put together what the command line, the environment, the configuration file and the profile say.

    Args:
        config, profile, env: as in `ConfigSource`.
        on_note: told what became of keys in the file that are not settings any more.

    Raises:
        ConfigError: a value is not allowed, or a name not known; the message has a line for each.
    """
    loaded = read_settings(ConfigSource(config=config, profile=profile, env=env))
    for note in loaded.notes:
        on_note(note)
    return loaded.settings


def read_settings(source: ConfigSource, contents: Mapping[Path, bytes] | None = None) -> LoadedSettings:
    """The same, with where each setting is from.

    Args:
        source: what the command line says.
        contents: what files are taken to hold, in place of what they do.

    Raises:
        ConfigError: as `load_settings`.
    """
    try:
        return _read_settings(source, contents or {})
    except RecursionError:
        raise ConfigError("settings are nested too deeply") from None


def _read_settings(source: ConfigSource, contents: Mapping[Path, bytes]) -> LoadedSettings:
    layers = _layers_above_files(source)
    notes: list[str] = []
    files: dict[Path, bytes] = {}
    for path in _files(layers, notes):
        given = contents.get(path)
        files[path] = read_config_bytes(path) if given is None else given
        layers += _file_layers(files[path], path, notes)
    name = next((layer.values["profile"] for layer in layers if "profile" in layer.values), Profile.AUTO)
    if name in list(Profile):  # otherwise said below
        layers.append(Layer(values=PROFILES[Profile(name)], origin=f"profile {name}"))
    raw, problems = merge_all(layers), list[str]()
    values = resolved(raw, os.environ, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    settings = _checked_settings(values, layers, problems)
    if settings is None:
        # A component's own message may show a value that came by a reference.
        raise ConfigError(without_secrets("\n".join(problems), values, masked(values, raw)))
    return LoadedSettings(source=source, settings=settings, layers=layers, files=files, notes=notes)


def _checked_settings(values: Mapping[str, Any], layers: Sequence[Layer], problems: list[str]) -> Settings | None:
    """None: there are problems, of each of which there is a line."""
    try:
        settings = Settings(**values)
    except ValidationError as error:
        problems += [_problem(detail, layers) for detail in error.errors()]
        return None
    problems += _problems_of_models(settings)
    return None if problems else settings


def config_files(source: ConfigSource) -> list[Path]:
    """The files that settings are read from, the overlay first. Raises ConfigError."""
    return _files(_layers_above_files(source), [])


def with_overrides(kind: type[ConfigT], base: ConfigT | None, values: Mapping[str, Any], *path: str) -> ConfigT:
    """A component's settings with some of them changed.

    Args:
        kind: their class.
        base: the settings; None: their defaults.
        path: where they are, for messages.

    Raises:
        ConfigError: a name is not known, or a value not allowed; the message has a line for each.
    """
    schema = block_schema(kind)
    problems: list[str] = []
    values = checked(values, schema, settings_schema(), problems, *path)
    if problems:
        raise ConfigError("\n".join(problems))
    before = {} if base is None else asdict(base)  # type: ignore[call-overload]
    try:
        return TypeAdapter(kind).validate_python(merged(before, values))
    except ValidationError as error:
        lines = [_problem({**detail, "loc": (*path, *detail["loc"])}, []) for detail in error.errors()]
        # Not chained, as above.
        raise ConfigError("\n".join(lines)) from None


EngineSettings = EngineConfig | VllmConfig | DeepSpeedConfig | RemoteConfig | dict[str, Any]


def engine_settings(settings: Settings, model: ModelSpec, engine: EngineSpec, *path: str) -> EngineSettings:
    """All settings of one engine of a model: its own over those of its kind's block.

    Args:
        path: where its own are, for messages; its kind, if none.

    Raises:
        ConfigError: as `with_overrides`.
    """
    where = path or (engine.engine,)
    match engine.engine:
        case "native":
            return with_overrides(EngineConfig, settings.engine, engine.settings, *(path or ("engine",)))
        case "vllm":
            return with_overrides(VllmConfig, settings.vllm, engine.settings, *where)
        case "deepspeed":
            return with_overrides(DeepSpeedConfig, settings.deepspeed, engine.settings, *where)
        case "remote":
            return with_overrides(RemoteConfig, None, {"model": model.model, **engine.settings}, *where)
    return {**settings.other_engines.get(engine.engine, {}), **engine.settings}


def settings_schema() -> Schema:
    """The names of all settings."""
    return {name: block_schema(field.annotation) for name, field in Settings.model_fields.items()}


def _problems_of_models(settings: Settings) -> list[str]:
    """A line about each name that two models have, and about settings that an engine cannot have."""
    names = Counter(name for model in settings.models for name in model.names)
    problems = [
        f"models: {count} of them are named {name!r}; give all but one another name"
        for name, count in names.items()
        if count > 1
    ]
    for at, model in enumerate(settings.models):
        for place, engine in enumerate(model.engines):
            try:
                engine_settings(settings, model, engine, "models", str(at), "engines", str(place), "settings")
            except ConfigError as error:
                problems.append(str(error))
    return problems


def _layers_above_files(source: ConfigSource) -> list[Layer]:
    """Raises ConfigError."""
    variables = read_environment(os.environ, settings_schema())
    return source.layers() + [
        Layer(values=values, origin=f"environment variable {name}") for name, values in variables
    ]


def _files(layers: Sequence[Layer], notes: list[str]) -> list[Path]:
    """The configuration file, its overlay before it. Raises ConfigError."""
    file, env = (
        next((layer.values[name] for layer in layers if name in layer.values), None) for name in NOT_IN_FILES
    )
    if env is not None and not (isinstance(env, str) and _ENV.fullmatch(env)):
        raise ConfigError(f"env is {shown(env)}; it must be up to 64 letters, digits, '-' and '_'")
    if file is None:
        if env is not None:
            notes.append(f"env is {env!r}, but there is no configuration file that it could have an overlay for")
        return []
    path = _expanded(Path(file)).absolute()
    if env is None:
        return [path]
    overlay = path.with_name(f"{path.stem}.{env}{path.suffix}")
    return [overlay, path]


def _file_layers(data: bytes, path: Path, notes: list[str]) -> list[Layer]:
    """A file's own settings, and below them those that older keys in it stand for. Raises ConfigError."""
    values = parse_config(data, path)
    try:
        file = migrate(values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    names = {name: kind for name, kind in settings_schema().items() if name not in NOT_IN_FILES}
    problems = [
        f"{name!r} cannot be set in a file; say it with --{name} or LOCALMOE_{name.upper()}"
        for name in NOT_IN_FILES
        if name in file.values
    ]
    # What is left of the tuning blocks are keys that they never had.
    blocks: Schema = {block: dict.fromkeys(keys) for block, keys in TUNING_BLOCKS.items()} if file.is_old else {}
    own = {name: value for name, value in file.values.items() if name not in NOT_IN_FILES}
    own = checked(own, names | blocks, names, problems)
    own = {name: value for name, value in own.items() if name not in blocks}
    problems += [
        f"{name!r} is a secret and must not stand in a file; write env:NAME or file:/path in its place"
        for name in plain_secrets(own)
    ]
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    notes += [f"{path}: {note}" for note in file.notes]
    return [
        Layer(values=own, origin=f"file {path}", file=path),
        Layer(values=file.translated, origin=f"an older key of file {path}"),
    ]


def _expanded(path: Path) -> Path:
    """With the home directory in place of `~`. Raises ConfigError."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: the home directory is not known here; name one that begins with /") from error


def _problem(detail: ErrorDetails, layers: Sequence[Layer]) -> str:
    """A line about a setting that is not allowed."""
    path = [str(part) for part in detail["loc"]]
    if detail["type"] == "value_error":  # of a component's own check, which begins with the setting's name
        message = str(detail.get("ctx", {}).get("error", detail["msg"]))
        path.append(message.partition(" ")[0])
    else:
        said = "it must be a list" if detail["type"] == "tuple_type" else detail["msg"].lower()
        given = detail["input"]
        hidden = is_secret(path[-1]) or isinstance(given, Mapping | list)  # in which there may be secrets
        value = f"of type {type(given).__name__}" if hidden else shown(given)
        message = f"it is {value}: {said}"
    origin = next((layer.origin for layer in layers if has(layer.values, path)), None)
    return f"setting {'.'.join(path)!r}" + (f" ({origin}): " if origin else ": ") + message
