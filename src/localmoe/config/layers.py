"""Layers of values, of which the upper ones hide what lies below, and where each value is from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT = "default"
"""The origin of what nobody has set."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One source of values."""

    values: Mapping[str, Any]
    origin: str
    """What it is, for people."""
    file: Path | None = None
    """Where the values stand under the names that they have here, if it is a file."""


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Blocks are merged, anything else of the upper one is taken as it is."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        result[key] = merged(under, value) if both else value  # type: ignore[arg-type]
    return result


def merge_all(layers: Sequence[Layer]) -> dict[str, Any]:
    """Of layers, the uppermost first."""
    values: dict[str, Any] = {}
    for layer in reversed(layers):
        values = merged(values, layer.values)
    return values


def setter(path: Sequence[str], layers: Iterable[Layer]) -> Layer | None:
    """The uppermost layer that has this setting."""
    return next((layer for layer in layers if has(layer.values, path)), None)


def has(values: object, path: Sequence[str]) -> bool:
    """Whether there is something under these names, one in the other."""
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """The value under these names, one in the other."""
    for part in reversed(path):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def value_at(values: Any, path: Sequence[str]) -> Any:
    """What is under these names, of mappings or attributes; None where there is nothing."""
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else getattr(values, part, None)
    return values
