"""Names and kinds of all settings, and what is said about values that have other ones."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from types import UnionType
from typing import Any, get_args, get_origin

from localmoe.config.files import shown
from localmoe.config.seed_keys import RETIRED_KEYS, RETIRED_KEYS_OF

Schema = dict[str, Any]
"""Names that a block may have, each with its value's type, or with its own names where it is a block."""

_EXPONENT = re.compile(r"[+-]?\d{1,30}(\.\d{0,30})?[eE]\+?\d{1,2}", re.ASCII)


def block_schema(kind: Any) -> Any:
    """The names of a component's settings, by its dataclass; what is no component stays as it is."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return kind
    return {field.name: block_schema(field.type) for field in fields(kind)}


def _item_schema(kind: Any) -> Schema | None:
    """Of a list of blocks, the names that each may have; None for anything else."""
    item = block_schema(get_args(kind)[0]) if is_list(kind) else None
    return item if isinstance(item, dict) else None


def checked(values: Mapping[str, Any], schema: Schema, root: Schema, problems: list[str], *prefix: str) -> Schema:
    """Values without the blocks that are empty, and numbers such as "1e9" as numbers.

    Args:
        root: where else to look for a name that the schema does not have.
        problems: gets a line for each key that is not in the schema, and each value that cannot be its.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = (*prefix, str(key))
        if key not in schema:
            problems.append(unknown(path, schema, root))
            continue
        kind = schema[key]
        item_schema = _item_schema(kind)
        if item_schema is not None and isinstance(value, list):
            found[key] = [_checked_item(item, item_schema, root, problems, *path) for item in value]
        elif not isinstance(kind, dict):
            if isinstance(value, bool) and _is_number(kind):
                problems.append(f"{'.'.join(path)!r} is {value}; it must be a number")
            found[key] = plain_number(value, kind)
        elif isinstance(value, Mapping):
            found[key] = checked(value, kind, root, problems, *path)
        elif value is not None:
            problems.append(f"{'.'.join(path)!r} is {shown(value)}; it must be a block of settings")
    return found


def _checked_item(value: Any, schema: Schema, root: Schema, problems: list[str], *path: str) -> Any:
    """One block of a list."""
    if isinstance(value, Mapping):
        return checked(value, schema, root, problems, *path)
    problems.append(f"{'.'.join(path)!r} has {shown(value)} in it; it must be a list of blocks of settings")
    return value


def unknown(path: Sequence[str], schema: Schema, root: Schema) -> str:
    """A line about a key that is not in the schema of its block."""
    *prefix, key = path
    name = ".".join(path)
    retired = RETIRED_KEYS_OF.get(".".join(prefix), {})
    if key in retired or key in RETIRED_KEYS:
        return f"{name!r} is not a setting any more: {retired.get(key) or RETIRED_KEYS[key]}"
    if near := nearest(path, schema, root):
        return f"{name!r} is not a setting; did you mean {'.'.join(near)!r}?"
    return (
        f"{name!r} is not a setting; those of {'its block' if prefix else 'the top level'} are {', '.join(schema)}"
    )


def nearest(path: Sequence[str], schema: Schema, root: Schema) -> tuple[str, ...] | None:
    """The setting whose name is most like this one's: in the same block first, then anywhere."""
    *prefix, key = path
    names = {(*prefix, known): known for known in schema} | {leaf: leaf[-1] for leaf in leaves(root)}
    near = difflib.get_close_matches(key, names.values(), n=1)
    return next(full for full, known in names.items() if known == near[0]) if near else None


def plain_number(value: Any, kind: Any) -> Any:
    """A whole number from text such as "1e9", which YAML takes for text; anything else as it is."""
    if int in _members(kind) and isinstance(value, str) and _EXPONENT.fullmatch(value.strip()):
        number = Decimal(value.strip())
        return int(number) if number == number.to_integral_value() else value
    return value


def is_list(kind: Any) -> bool:
    """Whether a setting of this type takes several values."""
    return get_origin(kind) is tuple


def _is_number(kind: Any) -> bool:
    return bool({int, float} & _members(kind))


def _members(kind: Any) -> set[Any]:
    return set(get_args(kind)) if isinstance(kind, UnionType) else {kind}


def leaves(schema: Schema, *prefix: str) -> list[tuple[str, ...]]:
    """The paths of all settings."""
    found: list[tuple[str, ...]] = []
    for name, kind in schema.items():
        found += leaves(kind, *prefix, name) if isinstance(kind, dict) else [(*prefix, name)]
    return found
