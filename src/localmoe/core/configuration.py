"""What people are told of the configuration and of its history. Secrets in it are masked."""

from dataclasses import dataclass
from typing import Any, Literal

Effect = Literal["live", "models", "restart"]
"""When a changed setting takes effect: at once; with the models that it concerns, which are replaced while others
serve on; or when the server is started anew."""


@dataclass(frozen=True, kw_only=True)
class SettingChange:
    """One setting that two versions have otherwise."""

    key: str
    """Its path with dots, as `engine.max_num_seqs`."""
    before: Any
    after: Any


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """One file of a version."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ConfigVersion:
    """One version that was applied."""

    number: int
    """From 1 on; never used again."""
    time: str
    """UTC, ISO 8601."""
    author: str
    reason: str
    changes: tuple[SettingChange, ...]
    """From what was applied before it."""
    files: tuple[ConfigFile, ...]
    """The overlay first, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting, or a block of them."""

    key: str
    value: Any
    origins: dict[str, str]
    """Where each setting in it is from: a file, a variable, a flag, a profile, or `default`."""
    effects: dict[str, Effect]
    """When a change of each takes effect."""
    etag: str
    """Another one as soon as the value is."""


@dataclass(frozen=True, kw_only=True)
class ConfigState:
    """All settings."""

    version: int | None
    """In the history; None where no file is configured."""
    files: tuple[str, ...]
    """The overlay first, where there is one."""
    settings: dict[str, Any]
    origins: dict[str, str]
    restart: tuple[str, ...]
    """Settings whose values are new, and take effect when the server is started anew."""


@dataclass(frozen=True, kw_only=True)
class ConfigOutcome:
    """What came of a reload, a change or a rollback."""

    version: int | None
    changes: tuple[SettingChange, ...]
    restart: tuple[str, ...]
    """Settings whose values are new, and take effect when the server is started anew."""
    notes: tuple[str, ...]
    """On keys in the files that are not settings any more."""
    findings: tuple[str, ...]
    """What contradicts itself, what the machine lacks, and what of it lies idle, with the settings as they are now;
    nothing where no setting differs."""
