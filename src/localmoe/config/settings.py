"""The settings of one run. Nothing else in LocalMoE reads the environment.

Every setting has an environment variable: its name in capitals after `LOCALMOE_`; a component's settings have two
underscores between its name and theirs, as in `LOCALMOE_ENGINE__KV_CACHE_BYTES`. A variable that is set to nothing
counts as not set.
"""

from pathlib import Path

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from localmoe.core.errors import ConfigError
from localmoe.engine.config import EngineConfig
from localmoe.gateway.config import GatewayConfig

ENV_PREFIX = "LOCALMOE_"


class Settings(BaseSettings):
    """Read with `load_settings`, which turns a bad value into a `ConfigError`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", env_ignore_empty=True, frozen=True
    )

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


def load_settings() -> Settings:
    """Read all settings from the environment.

    Raises:
        ConfigError: a value is not allowed; the message has a line for each such setting.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            name = "__".join(map(str, detail["loc"]))
            problems.append(
                f"setting {name!r} is {detail['input']!r} (environment variable {ENV_PREFIX}{name.upper()}): "
                f"{detail['msg'].lower()}"
            )
        raise ConfigError("\n".join(problems)) from error
