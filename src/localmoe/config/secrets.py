"""Secrets among the settings: where they are kept, and how they are not shown.

A secret is known by its name. In a file it is a reference, `env:NAME` or `file:/path`, so that neither the file nor
its history has it; one that stands there itself is refused. A URL may be such a reference too, and must be where it
has a password in it. Environment variables may have the secrets themselves.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from localmoe.core.errors import ConfigError

MASK = "***"
"""What stands for a secret where settings are shown."""

_SECRET = re.compile(r"(.*_)?(api_?keys?|secrets?|passwords?|passwd|passphrase|token|(access|private|secret)_key)")
_URL = re.compile(r"(.*_)?url")
_REFERENCE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)|file:(/.+)")
_IN_QUERY = re.compile(r"(?i)(?<=[?&])(password|passwd|secret|token|api_?key)=[^&#\s]+")
_MAX_BYTES = 1 << 16


def is_secret(name: str) -> bool:
    """Whether the value of a setting of this name is never shown."""
    return _SECRET.fullmatch(name) is not None


def is_reference(value: object) -> bool:
    """Whether a secret's value says where the secret is."""
    return isinstance(value, str) and _REFERENCE.fullmatch(value) is not None


def plain_secrets(values: Any, *path: str) -> list[str]:
    """The paths of secrets that stand in a file's values themselves, of which there should be none."""
    if isinstance(values, Mapping):
        return [found for name, value in values.items() for found in plain_secrets(value, *path, str(name))]
    if isinstance(values, list | tuple):
        return [found for value in values for found in plain_secrets(value, *path)]
    if values is None or is_reference(values) or not path:
        return []
    has_password = _URL.fullmatch(path[-1]) and isinstance(values, str) and _has_password(values)
    return [".".join(path)] if is_secret(path[-1]) or has_password else []


def references(values: Any, *path: str) -> set[tuple[str, str]]:
    """All references in these values, each with the name that it stands under."""
    if isinstance(values, Mapping):
        return set().union(*(references(value, *path, str(name)) for name, value in values.items()))
    if isinstance(values, list | tuple):
        return set().union(*(references(value, *path) for value in values))
    return {(path[-1], values)} if path and _may_refer(path[-1]) and is_reference(values) else set()


def resolved(values: Any, environ: Mapping[str, str], problems: list[str], *path: str) -> Any:
    """The values with secrets in place of references.

    Args:
        problems: gets a line for each reference to something that is not there.
    """
    if isinstance(values, Mapping):
        return {name: resolved(value, environ, problems, *path, str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [resolved(value, environ, problems, *path) for value in values]
    if not path or not _may_refer(path[-1]) or not is_reference(values):
        return values
    try:
        return _resolve(values, environ)
    except ConfigError as error:
        problems.append(f"setting {'.'.join(path)!r} is {values}: {error}")
        return values


def masked(values: Any, raw: Any, *path: str) -> Any:
    """The values as they may be shown.

    Args:
        values: with secrets in them.
        raw: the same before references were resolved, as far as anybody set them.
    """
    if isinstance(values, Mapping):
        under: Callable[[Any], Any] = lambda name: raw.get(name) if isinstance(raw, Mapping) else None  # noqa: E731
        return {name: masked(value, under(name), *path, str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        beside: Sequence[Any] = raw if isinstance(raw, list | tuple) and len(raw) == len(values) else ()
        return [masked(value, beside[at] if beside else None, *path) for at, value in enumerate(values)]
    if values is None or not path:
        return values
    if _may_refer(path[-1]) and is_reference(raw):
        return raw
    if is_secret(path[-1]):
        return MASK
    return _masked_url(values) if isinstance(values, str) else values


def without_secrets(message: str, values: Any, shown: Any) -> str:
    """A message that may show values, with what `masked` shows in their place.

    Args:
        values: with secrets in them.
        shown: the same, masked.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            message = without_secrets(message, value, shown[name])
    elif isinstance(values, list | tuple):
        for value, one_shown in zip(values, shown, strict=True):
            message = without_secrets(message, value, one_shown)
    elif isinstance(values, str) and values and values != shown:
        for written in (values, repr(values)[1:-1]):
            message = message.replace(written, str(shown))
    return message


def _may_refer(name: str) -> bool:
    return is_secret(name) or _URL.fullmatch(name) is not None


def _user(url: str) -> str:
    """User and password of a URL, with the @ behind them; nothing where there are none."""
    rest = url.partition("://")[2]
    # To the last @: some programs take passwords as they are, with @ and / in them.
    return rest[: rest.rfind("@") + 1]


def _masked_url(text: str) -> str:
    """Whatever it is, without what would be a password if it is a URL."""
    user = _user(text)
    without = text.replace(f"://{user}", f"://{MASK}@", 1) if user else text
    return _IN_QUERY.sub(rf"\1={MASK}", without)


def _has_password(url: str) -> bool:
    if _IN_QUERY.search(url):
        return True
    if url.startswith(("http://", "https://")):  # whose paths may have an @ in them
        try:
            return bool(urlsplit(url).password)
        except ValueError:
            return False  # whoever takes the URL says so
    return ":" in _user(url)


def _resolve(reference: str, environ: Mapping[str, str]) -> str:
    """Raises ConfigError, which does not show the secret."""
    kind, _, name = reference.partition(":")
    if kind == "env":
        if not environ.get(name):
            raise ConfigError(f"the environment variable {name} is not set")
        return environ[name]
    try:
        with Path(name).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode().strip()
    except OSError as error:
        raise ConfigError(f"the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError("the file is not UTF-8 text") from None
    if len(data) > _MAX_BYTES or not text:
        raise ConfigError(f"the file is {'empty' if not text else f'larger than {_MAX_BYTES} bytes'}")
    return text
